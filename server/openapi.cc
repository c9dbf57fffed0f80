// The OpenAPI document that /openapi.json serves. The end-to-end tests check the server against it.
#include "server/http_api.h"
#include "server/service.h"

namespace linspec {
namespace {

constexpr char kPaths[] = R"json(
 "/v1/completions": {"post": {"summary": "Continue text", "requestBody": {"required": true, "content":
   {"application/json":
   {"schema": {"$ref": "#/components/schemas/CompletionRequest"}}}}, "responses": {
   "200": {"description": "Completion, or server-sent events with stream: true"}, "default":
   {"$ref": "#/components/responses/Error"}}}},
 "/v1/chat/completions": {"post": {"summary": "Answer a conversation", "requestBody": {"required": true, "content":
   {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}}}, "responses": {
   "200": {"description": "Completion, or server-sent events with stream: true"}, "default":
   {"$ref": "#/components/responses/Error"}}}},
 "/v1/models": {"get": {"summary": "The served model", "responses": {"200": {"description": "List of one"}}}},
 "/v1/models/{id}": {"get": {"summary": "One model", "parameters": [{"name": "id", "in": "path", "required": true,
   "schema": {"type": "string"}}], "responses": {"200": {"description": "Model"}, "404":
   {"$ref": "#/components/responses/Error"}}}},
 "/tokenize": {"post": {"summary": "Text or messages to token ids", "responses": {"200":
   {"description": "count, tokens"}}}},
 "/detokenize": {"post": {"summary": "Token ids to text", "responses": {"200": {"description": "prompt"}}}},
 "/health": {"get": {"summary": "Liveness", "security": [], "responses": {"200":
   {"description": "The process lives"}}}},
 "/ready": {"get": {"summary": "Readiness", "security": [], "responses": {"200": {"description": "Takes requests"},
   "503": {"description": "Draining"}}}},
 "/version": {"get": {"summary": "Version", "security": [], "responses": {"200": {"description": "version"}}}},
 "/metrics": {"get": {"summary": "Prometheus metrics", "responses": {"200": {"description": "Text format 0.0.4"}}}},
 "/openapi.json": {"get": {"summary": "This document", "responses": {"200": {"description": "OpenAPI 3.1"}}}}
)json";

// Shared by both generating routes.
constexpr char kCommonFields[] = R"json(
 "model": {"type": "string"}, "n": {"type": "integer", "minimum": 1, "default": 1},
 "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 1},
 "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 1},
 "top_k": {"type": "integer", "minimum": -1, "default": 0}, "min_p": {"type": "number", "minimum": 0, "maximum": 1},
 "typical_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
 "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
 "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
 "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
 "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
 "seed": {"type": "integer"}, "max_tokens": {"type": "integer"}, "min_tokens": {"type": "integer", "minimum": 0},
 "ignore_eos": {"type": "boolean"}, "stop": {"oneOf": [{"type": "string"}, {"type": "array", "items":
   {"type": "string"}}]},
 "stop_token_ids": {"type": "array", "items": {"type": "integer"}}, "include_stop_str_in_output": {"type": "boolean"},
 "stream": {"type": "boolean", "default": false}, "stream_options": {"type": "object", "properties": {"include_usage":
   {"type": "boolean"}, "include_obfuscation": {}}, "additionalProperties": false}, "priority": {"type": "integer",
   "default": 0},
 "speculation": {"type": "string", "enum": ["off", "draft", "medusa", "ngram", "auto"]},
 "acceptance": {"type": "string", "enum": ["gumbel", "rejection", "typical"]},
 "store": {"type": "boolean", "enum": [false]}, "response_format": {"type": "object"}, "user": {}, "metadata": {},
 "safety_identifier": {}, "prompt_cache_key": {}, "prompt_cache_retention": {}, "service_tier": {})json";

constexpr char kCompletionFields[] = R"json(
 "prompt": {"oneOf": [{"type": "string"}, {"type": "array"}]}, "echo": {"type": "boolean"},
 "logprobs": {"type": "integer", "minimum": 0, "maximum": 20}, "best_of": {"type": "integer", "minimum": 1})json";

constexpr char kChatFields[] = R"json(
 "messages": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["role", "content"], "properties":
   {"role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]}, "content": {}, "name": {},
   "refusal": {}}}},
 "max_completion_tokens": {"type": "integer", "minimum": 1}, "logprobs": {"type": "boolean"},
 "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20}, "tools": {"type": "array", "maxItems": 0},
 "tool_choice": {"const": "none"}, "modalities": {}, "parallel_tool_calls": {"type": "boolean"})json";

constexpr char kShared[] =
    R"json("responses": {"Error": {"description": "What was wrong, and with which field", "content":
   {"application/json":
 {"schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "object", "required":
 ["message", "type", "param", "code"], "properties": {"message": {"type": "string"}, "type": {"type": "string"},
 "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}}}}}},
 "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}})json";

std::string Schema(const char* required, const char* fields) {
  return std::string("{\"type\": \"object\", \"additionalProperties\": false, \"required\": [\"") + required +
         "\"], \"properties\": {" + kCommonFields + "," + fields + "}}";
}

}  // namespace

std::string OpenApiJson() {
  return std::string("{\"openapi\": \"3.1.0\", \"info\": {\"title\": \"linspec\", \"version\": \"") + kVersion +
         "\"}, \"security\": [{\"key\": []}, {}], \"paths\": {" + kPaths + "}, \"components\": {\"schemas\": {" +
         "\"CompletionRequest\": " + Schema("prompt", kCompletionFields) +
         ", \"ChatRequest\": " + Schema("messages", kChatFields) + "}, " + kShared + "}}";
}

}  // namespace linspec
