// Filters, tests, methods and global functions of the template language.
#pragma once

#include <string>

#include "models/jinja_value.h"

namespace linspec::jinja {

// arguments.positional[0] is the value filtered or tested. Fail on an unknown name or a wrong type.
Value ApplyFilter(const std::string& name, Arguments& arguments);
bool ApplyTest(const std::string& name, const Arguments& arguments);
// Method or attribute of a value: dict entries first by item syntax's rules, then methods; undefined if there is none.
Value GetAttribute(const Value& object, const std::string& name);
Value GetItem(const Value& object, const Value& key);
Value MakeRange(const Arguments& arguments);
bool Contains(const Value& container, const Value& item);
List Items(const Value& dict);     // pairs of key and value
List Iterate(const Value& value);  // elements of a list, keys of a dict, characters of a string

}  // namespace linspec::jinja
