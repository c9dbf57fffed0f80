// The OpenAPI document that /openapi.json serves. The end-to-end tests check the server against it.
#include "server/http_api.h"
#include "server/service.h"

namespace linspec {
namespace {

constexpr char kPaths[] = R"json(
 "/v1/completions": {"post": {"summary": "Continue text", "requestBody": {"required": true, "content":
   {"application/json":
   {"schema": {"$ref": "#/components/schemas/CompletionRequest"}}}}, "responses": {
   "200": {"description": "Whole, or with stream: true as server-sent events", "content": {"application/json":
   {"schema": {"$ref": "#/components/schemas/Completion"}}, "text/event-stream":
   {"schema": {"$ref": "#/components/schemas/CompletionChunk"}}}}, "default":
   {"$ref": "#/components/responses/Error"}}}},
 "/v1/chat/completions": {"post": {"summary": "Answer a conversation", "requestBody": {"required": true, "content":
   {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}}}, "responses": {
   "200": {"description": "Whole, or with stream: true as server-sent events", "content": {"application/json":
   {"schema": {"$ref": "#/components/schemas/ChatCompletion"}}, "text/event-stream":
   {"schema": {"$ref": "#/components/schemas/ChatCompletionChunk"}}}}, "default":
   {"$ref": "#/components/responses/Error"}}}},
 "/v1/responses": {"post": {"summary": "Answer text or messages; nothing is stored", "requestBody": {"required": true,
   "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ResponsesRequest"}}}}, "responses": {
   "200": {"description": "Whole, or with stream: true as the events of OpenAI's Responses API", "content":
   {"application/json": {"schema": {"$ref": "#/components/schemas/Response"}}, "text/event-stream": {"schema":
   {"type": "object", "required": ["type", "sequence_number"], "properties": {"type": {"type": "string"},
   "sequence_number": {"type": "integer"}}}}}}, "default": {"$ref": "#/components/responses/Error"}}}},
 "/v1/models": {"get": {"summary": "The served model", "responses": {"200": {"description": "List of one",
   "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ModelList"}}}}}}},
 "/v1/models/{id}": {"get": {"summary": "One model", "parameters": [{"name": "id", "in": "path", "required": true,
   "schema": {"type": "string"}}], "responses": {"200": {"description": "Model",
   "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Model"}}}}, "404":
   {"$ref": "#/components/responses/Error"}}}},
 "/tokenize": {"post": {"summary": "Text or messages to token ids", "responses": {"200":
   {"description": "The ids", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Tokens"}}}},
   "default": {"$ref": "#/components/responses/Error"}}}},
 "/detokenize": {"post": {"summary": "Token ids to text", "responses": {"200":
   {"description": "The text", "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Text"}}}},
   "default": {"$ref": "#/components/responses/Error"}}}},
 "/health": {"get": {"summary": "Liveness", "security": [], "responses": {"200":
   {"description": "The process lives"}}}},
 "/ping": {"get": {"summary": "Liveness, by the name that vLLM and SageMaker use", "security": [], "responses": {"200":
   {"description": "The process lives"}}}},
 "/ready": {"get": {"summary": "Readiness", "security": [], "responses": {"200": {"description": "Takes requests"},
   "503": {"description": "Draining"}}}},
 "/health_generate": {"get": {"summary": "Whether tokens come out", "responses": {"200":
   {"description": "They did, at the last look (--probe-interval)"}, "503": {"description": "They did not"}}}},
 "/version": {"get": {"summary": "Version", "security": [], "responses": {"200": {"description": "version"}}}},
 "/props": {"get": {"summary": "Limits, slots and chat template, by the names of llama.cpp", "responses": {"200":
   {"description": "Properties", "content": {"application/json": {"schema":
   {"$ref": "#/components/schemas/Props"}}}}}}},
 "/metrics": {"get": {"summary": "Prometheus metrics", "responses": {"200": {"description": "Text format 0.0.4"}}}},
 "/openapi.json": {"get": {"summary": "This document", "responses": {"200": {"description": "OpenAPI 3.1"}}}}
)json";

// Shared by both generating routes.
constexpr char kCommonFields[] = R"json(
 "model": {"type": "string"}, "n": {"type": "integer", "minimum": 1, "default": 1},
 "temperature": {"type": "number", "minimum": 0, "maximum": 2, "description":
   "default: the model's (--generation-config), as top_p's, top_k's, min_p's and repetition_penalty's; /props tells"},
 "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
 "top_k": {"type": "integer", "minimum": -1}, "min_p": {"type": "number", "minimum": 0, "maximum": 1},
 "typical_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
 "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
 "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
 "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
 "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
 "seed": {"type": "integer"}, "max_tokens": {"type": "integer", "minimum": 0}, "min_tokens": {"type": "integer", "minimum": 0},
 "skip_special_tokens": {"type": "boolean", "default": true}, "spaces_between_special_tokens": {"const": true},
 "use_beam_search": {"const": false}, "length_penalty": {"const": 1}, "include_reasoning": {"const": true},
 "return_token_offsets": {"const": false}, "return_mm_kwargs": {"const": true}, "return_prompt_text": {"const": false},
 "routed_experts_prompt_start": {"const": 0}, "cache_salt": {"type": "string", "maxLength": 1024}, "request_id": {"type": "string"},
 "return_token_ids": {"type": "boolean", "description": "token_ids of each choice and prompt_token_ids"},
 "return_tokens_as_token_ids": {"type": "boolean", "description": "logprobs name token 5 token_id:5"},
 "allowed_token_ids": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1,
   "description": "nothing else is chosen"},
 "bad_words": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
   "description": "never all of one in the output"},
 "truncate_prompt_tokens": {"type": "integer", "minimum": -1,
   "description": "keep at most so many of the prompt; -1: as many as the server takes"},
 "truncation_side": {"type": "string", "enum": ["left", "right"], "default": "left"},
 "ignore_eos": {"type": "boolean"}, "stop": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
 "stop_token_ids": {"type": "array", "items": {"type": "integer"}}, "include_stop_str_in_output": {"type": "boolean"},
 "stream": {"type": "boolean", "default": false}, "stream_options": {"type": "object", "properties": {"include_usage":
   {"type": "boolean"}, "include_obfuscation": {}, "continuous_usage_stats":
   {"type": "boolean"}}, "additionalProperties": false}, "priority": {"type": "integer",
   "minimum": -100000, "maximum": 100000, "default": 0,
   "description": "lower runs first, among the requests of the same API key"},
 "speculation": {"type": "string", "enum": ["off", "draft", "medusa", "recurrent", "ngram", "auto"]},
 "acceptance": {"type": "string", "enum": ["gumbel", "rejection", "typical"]},
 "store": {"type": "boolean", "enum": [false]}, "response_format": {"type": "object"}, "user": {}, "metadata": {},
 "safety_identifier": {}, "prompt_cache_key": {}, "prompt_cache_retention": {}, "service_tier": {})json";

constexpr char kCompletionFields[] = R"json(
 "prompt": {"oneOf": [{"type": "string"}, {"type": "array"}]}, "echo": {"type": "boolean"},
 "logprobs": {"type": "integer", "minimum": 0, "maximum": 20}, "best_of": {"type": "integer", "minimum": 1},
 "suffix": {"const": ""}, "add_special_tokens": {"type": "boolean", "default": true})json";

constexpr char kChatFields[] = R"json(
 "messages": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["role", "content"], "properties":
   {"role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]}, "content": {}, "name": {},
   "refusal": {}}}},
 "max_completion_tokens": {"type": "integer", "minimum": 1}, "logprobs": {"type": "boolean"},
 "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20}, "tools": {"type": "array", "maxItems": 0},
 "tool_choice": {"const": "none"}, "modalities": {}, "parallel_tool_calls": {"type": "boolean"},
 "chat_template_kwargs": {"type": "object", "maxProperties": 0}, "add_generation_prompt": {"const": true},
 "continue_final_message": {"const": false}, "add_special_tokens": {"const": false}, "echo": {"const": false})json";

constexpr char kResponsesRequest[] = R"json(
 {"type": "object", "additionalProperties": false, "required": ["input"], "properties": {
 "input": {"oneOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "object", "required":
   ["role", "content"], "properties": {"type": {"const": "message"}, "role": {"enum": ["system", "developer", "user",
   "assistant"]}, "content": {}, "id": {}, "status": {}, "phase": {}}}}]},
 "model": {"type": "string"}, "instructions": {"type": "string"}, "max_output_tokens": {"type": "integer", "minimum": 1},
 "temperature": {"type": "number", "minimum": 0, "maximum": 2},
 "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
 "stream": {"type": "boolean", "default": false}, "stream_options": {"const": {"include_obfuscation": false}},
 "metadata": {"type": "object"}, "store": {"type": "boolean", "enum": [false]}, "background": {"const": false},
 "tools": {"type": "array", "maxItems": 0}, "include": {"type": "array", "maxItems": 0}, "tool_choice": {"const": "none"},
 "truncation": {"const": "disabled"}, "top_logprobs": {"const": 0}, "text": {"const": {"format": {"type": "text"}}},
 "parallel_tool_calls": {"type": "boolean"}, "user": {}, "safety_identifier": {}, "prompt_cache_key": {},
 "prompt_cache_retention": {}, "service_tier": {}}})json";

// What the server says. Closed objects: a field that is not here is not sent.
constexpr char kAnswers[] = R"json(
 "Usage": {"type": "object", "additionalProperties": false, "required": ["prompt_tokens", "completion_tokens",
   "total_tokens", "prompt_tokens_details", "completion_tokens_details"], "properties": {"prompt_tokens": {"type": "integer", "minimum": 0},
   "completion_tokens": {"type": "integer", "minimum": 0}, "total_tokens": {"type": "integer", "minimum": 0},
   "prompt_tokens_details": {"type": "object", "additionalProperties": false, "properties":
   {"cached_tokens": {"type": "integer", "minimum": 0}}},
   "completion_tokens_details": {"type": "object", "additionalProperties": false, "properties":
   {"accepted_prediction_tokens": {"type": "integer"}, "rejected_prediction_tokens": {"type": "integer"}}}}},
 "TokenIds": {"type": "array", "items": {"type": "integer", "minimum": 0}},
 "StopReason": {"type": ["string", "integer", "null"]},
 "FinishReason": {"enum": ["stop", "length", null]},
 "CompletionChoice": {"type": "object", "additionalProperties": false, "required": ["index", "text", "logprobs",
   "finish_reason"], "properties": {"index": {"type": "integer"}, "text": {"type": "string"}, "stop_reason":
   {"$ref": "#/components/schemas/StopReason"}, "token_ids": {"$ref": "#/components/schemas/TokenIds"},
   "prompt_token_ids": {"$ref": "#/components/schemas/TokenIds"}, "finish_reason":
   {"$ref": "#/components/schemas/FinishReason"}, "logprobs": {"type": ["object", "null"], "additionalProperties": false,
   "properties": {"tokens": {"type": "array", "items": {"type": "string"}}, "token_logprobs": {"type": "array", "items":
   {"type": ["number", "null"]}}, "top_logprobs": {"type": ["array", "null"]}, "text_offset": {"type": "array", "items":
   {"type": "integer"}}}}}},
 "TokenLogprob": {"type": "object", "additionalProperties": false, "required": ["token", "logprob", "bytes"],
   "properties": {"token": {"type": "string"}, "logprob": {"type": "number"}, "bytes": {"type": "array", "items":
   {"type": "integer", "minimum": 0, "maximum": 255}}, "top_logprobs": {"type": "array", "items":
   {"$ref": "#/components/schemas/TokenLogprob"}}}},
 "ChatLogprobs": {"type": ["object", "null"], "additionalProperties": false, "properties": {"refusal": {"type": "null"},
   "content": {"type": "array", "items": {"$ref": "#/components/schemas/TokenLogprob"}}}},
 "ChatMessage": {"type": "object", "additionalProperties": false, "properties": {"role": {"const": "assistant"},
   "content": {"type": "string"}, "refusal": {"type": "null"}}},
 "Model": {"type": "object", "additionalProperties": false, "required": ["id", "object", "created", "owned_by"],
   "properties": {"id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by":
   {"const": "linspec"}, "max_model_len": {"type": "integer"}}},
 "ModelList": {"type": "object", "additionalProperties": false, "properties": {"object": {"const": "list"}, "data":
   {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}}},
 "Tokens": {"type": "object", "additionalProperties": false, "properties": {"count": {"type": "integer"},
   "max_model_len": {"type": "integer"}, "tokens": {"type": "array", "items": {"type": "integer"}}, "token_strs":
   {"type": "array", "items": {"type": "string"}}}},
 "Props": {"type": "object", "additionalProperties": false, "required": ["default_generation_settings", "total_slots",
   "chat_template"], "properties": {"default_generation_settings": {"type": "object", "required": ["n_ctx", "params"],
   "properties": {"n_ctx": {"type": "integer"}, "params": {"type": "object"}}}, "total_slots": {"type": "integer"},
   "model_alias": {"type": "string"}, "model_path": {"type": "string"}, "modalities": {"type": "object"}, "build_info":
   {"type": "string"}, "chat_template": {"type": "string"}, "bos_token": {"type": "string"}, "eos_token":
   {"type": "string"}}},
 "Response": {"type": "object", "required": ["id", "object", "created_at", "status", "output", "model", "usage"],
   "properties": {"id": {"type": "string"}, "object": {"const": "response"}, "created_at": {"type": "integer"},
   "status": {"enum": ["completed", "incomplete", "in_progress"]}, "output": {"type": "array", "items": {"type": "object",
   "required": ["id", "type", "role", "status", "content"]}}, "model": {"type": "string"}, "usage": {"type": ["object",
   "null"], "required": ["input_tokens", "output_tokens", "total_tokens"]}}},
 "Text": {"type": "object", "additionalProperties": false, "properties": {"prompt": {"type": "string"}}},
 "Error": {"type": "object", "additionalProperties": false, "required": ["error"], "properties": {"error": {"type":
   "object", "additionalProperties": false, "required": ["message", "type", "param", "code"], "properties": {"message":
   {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]}, "code": {"type": ["string",
   "null"]}}}}})json";

constexpr char kShared[] =
    R"json("responses": {"Error": {"description": "What was wrong, and with which field", "content":
   {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}},
 "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}})json";

// An answer around choices of the given schema; a chunk's last one, with usage asked for, carries no choice.
std::string Answer(const char* object, const std::string& choice, bool chunk) {
  return std::string("{\"type\": \"object\", \"additionalProperties\": false, \"required\": [\"id\", \"object\", ") +
         "\"created\", \"model\", \"choices\"" + (chunk ? "" : ", \"usage\"") +
         "], \"properties\": {\"id\": {\"type\": \"string\"}, \"object\": {\"const\": \"" + object +
         "\"}, \"created\": {\"type\": \"integer\"}, \"model\": {\"type\": \"string\"}, \"usage\": " +
         "{\"$ref\": \"#/components/schemas/Usage\"}, \"prompt_token_ids\": {\"$ref\": " +
         "\"#/components/schemas/TokenIds\"}, \"choices\": {\"type\": \"array\", \"items\": " + choice + "}}}";
}

std::string ChatChoice(const char* part) {
  return std::string("{\"type\": \"object\", \"additionalProperties\": false, \"required\": [\"index\", \"") + part +
         "\", \"logprobs\", \"finish_reason\"], \"properties\": {\"index\": {\"type\": \"integer\"}, \"" + part +
         "\": {\"$ref\": \"#/components/schemas/ChatMessage\"}, \"logprobs\": {\"$ref\": " +
         "\"#/components/schemas/ChatLogprobs\"}, \"stop_reason\": {\"$ref\": " +
         "\"#/components/schemas/StopReason\"}, \"token_ids\": {\"$ref\": \"#/components/schemas/TokenIds\"}, " +
         "\"finish_reason\": {\"$ref\": \"#/components/schemas/FinishReason\"}}}";
}

std::string Answers() {
  const std::string text = "{\"$ref\": \"#/components/schemas/CompletionChoice\"}";
  return "\"Completion\": " + Answer("text_completion", text, false) +
         ", \"CompletionChunk\": " + Answer("text_completion", text, true) +
         ", \"ChatCompletion\": " + Answer("chat.completion", ChatChoice("message"), false) +
         ", \"ChatCompletionChunk\": " + Answer("chat.completion.chunk", ChatChoice("delta"), true) + "," + kAnswers;
}

std::string Schema(const char* required, const char* fields) {
  return std::string("{\"type\": \"object\", \"additionalProperties\": false, \"required\": [\"") + required +
         "\"], \"properties\": {" + kCommonFields + "," + fields + "}}";
}

}  // namespace

std::string OpenApiJson() {
  return std::string("{\"openapi\": \"3.1.0\", \"info\": {\"title\": \"linspec\", \"version\": \"") + kVersion +
         "\"}, \"security\": [{\"key\": []}, {}], \"paths\": {" + kPaths + "}, \"components\": {\"schemas\": {" +
         "\"CompletionRequest\": " + Schema("prompt", kCompletionFields) +
         ", \"ChatRequest\": " + Schema("messages", kChatFields) + ", \"ResponsesRequest\": " + kResponsesRequest +
         ", " + Answers() + "}, " + kShared + "}}";
}

}  // namespace linspec
