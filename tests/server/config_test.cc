#include "server/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>

#include "server/auth.h"

namespace linspec {
namespace {

using testing::HasSubstr;

absl::StatusOr<ServerConfig> Parse(std::vector<std::string> args) { return ParseServerConfig(args); }

std::string ErrorOf(std::vector<std::string> args) { return std::string(Parse(std::move(args)).status().message()); }

std::string WriteFile(const std::string& name, const std::string& text) {
  const std::string path = testing::TempDir() + name;
  std::ofstream(path) << text;
  return path;
}

TEST(Config, BothSpellings) {
  const auto config =
      Parse({"--http-port", "80", "--speculation=off", "--drain-timeout", "1.5", "--public-metrics=false"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->network.http_port, 80);
  EXPECT_EQ(config->engine.speculation, "off");
  EXPECT_EQ(config->operations.drain_timeout_s, 1.5);
  EXPECT_FALSE(config->security.public_metrics);
}

TEST(Config, CommandLineOverFileOverDefaults) {
  const std::string file = WriteFile("config.yaml", "# comment\nhttp-port: 1234\nmax-requests: 7\nhost: 0.0.0.0\n");
  const auto config = Parse({"--http-port", "99", "--config", file});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->network.http_port, 99);
  EXPECT_EQ(config->engine.max_requests, 7);
  EXPECT_EQ(config->network.host, "0.0.0.0");
  EXPECT_EQ(config->network.grpc_port, 50051);
}

TEST(Config, ErrorsNameFlagAndValue) {
  EXPECT_THAT(ErrorOf({"--http-port", "eighty"}), testing::AllOf(HasSubstr("--http-port"), HasSubstr("eighty")));
  EXPECT_THAT(ErrorOf({"--http-port", "65536"}), HasSubstr("65535"));
  EXPECT_THAT(ErrorOf({"--http-port", "80x"}), HasSubstr("80x"));
  EXPECT_THAT(ErrorOf({"--idle-timeout", "nan"}), HasSubstr("nan"));
  EXPECT_THAT(ErrorOf({"--isa", "mmx"}), HasSubstr("avx512"));
  EXPECT_THAT(ErrorOf({"--public-metrics", "1"}), HasSubstr("true or false"));
  EXPECT_THAT(ErrorOf({"--max-request", "1"}), HasSubstr("did you mean --max-requests?"));
  EXPECT_THAT(ErrorOf({"--frobnicate", "1"}), HasSubstr("help serve"));
  EXPECT_THAT(ErrorOf({"--host"}), HasSubstr("needs a value"));
  EXPECT_THAT(ErrorOf({"serve"}), HasSubstr("unexpected argument"));
  EXPECT_THAT(ErrorOf({"--http-port", "5", "--grpc-port", "5"}), HasSubstr("both 5"));
  EXPECT_THAT(ErrorOf({"--tls-cert", "x"}), HasSubstr("--tls-key"));
}

TEST(Config, FileErrorsNameTheFile) {
  for (const char* text : {"nonsense: 1\n", "- a\n- b\n", "host: [1, 2]\n", "a: b: c\n", "http-port: x\n"}) {
    EXPECT_THAT(ErrorOf({"--config", WriteFile("bad.yaml", text)}), HasSubstr("bad.yaml")) << text;
  }
}

TEST(Config, HelpAndPrintListEveryFlag) {
  const std::string help = ServerHelp(), print = DescribeConfig(ServerConfig());
  for (const char* flag :
       {"--model", "--max-queue-tokens", "--stream-buffer-bytes", "--api-key-file", "--metrics-alias"}) {
    EXPECT_THAT(help, HasSubstr(flag));
    EXPECT_THAT(print, HasSubstr(flag));
  }
  ServerConfig changed;
  changed.engine.max_requests = 3;
  EXPECT_THAT(DescribeConfig(changed), HasSubstr("* --max-requests"));
}

TEST(Auth, KeysAndPublicRoutes) {
  // sha256("two")
  const std::string file =
      WriteFile("keys", "one\nsha256:3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3\n");
  auto auth = Authenticator::Create(file, false);
  ASSERT_TRUE(auth.ok()) << auth.status();
  EXPECT_TRUE((*auth)->Check("Bearer one").ok());
  EXPECT_TRUE((*auth)->Check("Bearer two").ok());
  EXPECT_NE(*(*auth)->Check("Bearer one"), *(*auth)->Check("Bearer two"));
  for (const char* wrong :
       {"", "one", "Bearer", "Bearer ", "Bearer One", "Bearer on", "Bearer one ", "bearer one", "Basic one"}) {
    EXPECT_EQ((*auth)->Check(wrong).status().code(), absl::StatusCode::kUnauthenticated) << wrong;
  }
  EXPECT_TRUE((*auth)->IsPublicRoute("/health"));
  EXPECT_FALSE((*auth)->IsPublicRoute("/metrics"));
  EXPECT_FALSE((*auth)->IsPublicRoute("/tokenize"));
  EXPECT_FALSE(Authenticator::Create(WriteFile("bad", "sha256:12\n"), false).ok());
  EXPECT_FALSE(Authenticator::Create(WriteFile("empty", "# nothing\n"), false).ok());
}

TEST(Auth, TellsHowManyKeysThereAre) {
  const std::string file = WriteFile("counted", "one\n");
  std::filesystem::last_write_time(file, std::filesystem::file_time_type::clock::now() - std::chrono::hours(1));
  auto auth = Authenticator::Create(file, false);
  ASSERT_TRUE(auth.ok()) << auth.status();
  std::vector<size_t> counts;
  (*auth)->WatchKeys([&](size_t keys) { counts.push_back(keys); });
  EXPECT_EQ(counts, (std::vector<size_t>{1}));
  WriteFile("counted", "one\ntwo\nthree\n");
  EXPECT_TRUE((*auth)->Check("Bearer three").ok());
  EXPECT_EQ(counts, (std::vector<size_t>{1, 3}));
}

}  // namespace
}  // namespace linspec
