#include "server/log.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

namespace linspec {
namespace {

TEST(LogTest, JsonFieldsAreEscaped) {
  const std::string event = FormatLogEvent(
      LogFormat::kJson, "a \"b\"\n",
      {{"text", "x\"\\\n\x01"}, {"bad", "\xff"}, {"n", int64_t{-3}}, {"ms", 1.5}, {"none", std::nan("")}});
  const nlohmann::json parsed = nlohmann::json::parse("{" + event + "}");
  EXPECT_EQ(parsed["event"], "a \"b\"\n");
  EXPECT_EQ(parsed["text"], "x\"\\\n\x01");
  EXPECT_EQ(parsed["bad"], "\xEF\xBF\xBD");
  EXPECT_EQ(parsed["n"], -3);
  EXPECT_EQ(parsed["ms"], 1.5);
  EXPECT_TRUE(parsed["none"].is_null());
}

TEST(LogTest, TextKeepsOneEventOnOneLine) {
  EXPECT_EQ(
      FormatLogEvent(LogFormat::kText, "done", {{"id", "a-1"}, {"why", "x\ny z"}, {"empty", ""}, {"n", int64_t{2}}}),
      "done id=a-1 why=\"x\\ny z\" empty=\"\" n=2");
}

TEST(LogTest, WritesLinesAboveItsLevel) {
  std::array<int, 2> ends{};
  ASSERT_EQ(pipe(ends.data()), 0);
  {
    Log log(LogFormat::kJson, LogLevel::kInfo, ends[1]);
    EXPECT_FALSE(log.Enabled(LogLevel::kDebug));
    log.Write(LogLevel::kDebug, "hidden");
    log.Write(LogLevel::kWarn, "shown", {{"request_id", "r"}});
  }
  close(ends[1]);
  std::array<char, 4096> bytes{};
  const ssize_t size = read(ends[0], bytes.data(), bytes.size());
  close(ends[0]);
  ASSERT_GT(size, 0);
  const nlohmann::json line = nlohmann::json::parse(std::string(bytes.data(), static_cast<size_t>(size)));
  EXPECT_EQ(line["event"], "shown");
  EXPECT_EQ(line["level"], "warning");
  EXPECT_EQ(line["request_id"], "r");
  EXPECT_TRUE(line.contains("time"));
}

// A full disk must neither stop the server nor pass unnoticed.
TEST(LogTest, CountsLinesThatADiskDidNotTake) {
  const int full = open("/dev/full", O_WRONLY);
  ASSERT_GE(full, 0);
  Log log(LogFormat::kText, LogLevel::kInfo, full);
  for (int i = 0; i < 3; ++i) log.Write(LogLevel::kInfo, "lost");
  while (log.lines_lost() < 3) usleep(1000);  // the test's own timeout ends a log that does not count
  EXPECT_EQ(log.lines_lost(), 3);
  close(full);
}

// The process must be able to end although nobody reads its log.
TEST(LogTest, APipeThatNobodyReadsLosesLinesButDoesNotHangTheEnd) {
  std::array<int, 2> ends{};
  ASSERT_EQ(pipe(ends.data()), 0);
  const std::string long_text(1000, 'x');
  {
    Log log(LogFormat::kText, LogLevel::kInfo, ends[1]);
    for (int i = 0; i < 1000; ++i) log.Write(LogLevel::kInfo, "unread", {{"text", long_text}});
    while (log.lines_lost() == 0) usleep(1000);
  }
  close(ends[0]);
  close(ends[1]);
}

}  // namespace
}  // namespace linspec
