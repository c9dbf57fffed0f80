// CHECK for broken invariants of our own code: prints and aborts. Never applied to what a user, file or network sends.
#pragma once

#include <cstdio>
#include <cstdlib>

#define LINSPEC_CHECK(condition)                                                         \
  do {                                                                                   \
    if (!(condition)) [[unlikely]] {                                                     \
      std::fprintf(stderr, "%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)
