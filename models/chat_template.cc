#include "models/chat_template.h"

#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "models/jinja_ast.h"
#include "models/jinja_render.h"
#include "models/jinja_value.h"
#include "models/json_check.h"

namespace linspec {
namespace {

class JinjaChatTemplate : public ChatTemplate {
 public:
  explicit JinjaChatTemplate(std::vector<jinja::Node> nodes) : nodes_(std::move(nodes)) {}

  absl::StatusOr<std::string> Render(std::string_view context_json) const override {
    if (absl::Status status = CheckJson(context_json); !status.ok()) return status;
    const auto context = nlohmann::ordered_json::parse(context_json, nullptr, false);
    if (!context.is_object()) return absl::InvalidArgumentError("the chat context is not a JSON object");
    try {
      return jinja::Render(nodes_, jinja::FromJson(context).dict());
    } catch (const jinja::Error& error) {
      return absl::Status(error.code, "chat template: " + error.message);
    }
  }

 private:
  const std::vector<jinja::Node> nodes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Parse(std::string_view source) {
  try {
    return std::unique_ptr<ChatTemplate>(std::make_unique<JinjaChatTemplate>(jinja::ParseTemplate(source)));
  } catch (const jinja::Error& error) {
    return absl::Status(error.code, "chat template: " + error.message);
  }
}

}  // namespace linspec
