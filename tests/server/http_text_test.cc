#include "server/http_text.h"

#include <gtest/gtest.h>

namespace linspec {
namespace {

TEST(HttpText, DatesAreThoseOfRfc9110) {
  EXPECT_EQ(HttpDate(784111777), "Sun, 06 Nov 1994 08:49:37 GMT");
  EXPECT_EQ(HttpDate(0), "Thu, 01 Jan 1970 00:00:00 GMT");
}

TEST(HttpText, TargetsInAbsoluteForm) {
  EXPECT_EQ(OriginForm("/health?x=http://y/z"), "/health?x=http://y/z");
  EXPECT_EQ(OriginForm("http://a:80/v1/models?x"), "/v1/models?x");
  EXPECT_EQ(OriginForm("HTTPS://a/"), "/");
  EXPECT_EQ(OriginForm("http://a"), "/");
  EXPECT_EQ(OriginForm("http://a?x"), "/?x");
  EXPECT_EQ(OriginForm("*"), "*");
  EXPECT_EQ(OriginForm(""), "");
}

TEST(HttpText, Escapes) {
  EXPECT_EQ(PercentDecoded("org%2Fmodel%2d7b"), "org/model-7b");
  EXPECT_EQ(PercentDecoded("100%"), "100%");
  EXPECT_EQ(PercentDecoded("%4"), "%4");
  EXPECT_EQ(PercentDecoded("%zz%-1%4g"), "%zz%-1%4g");
  EXPECT_EQ(PercentDecoded("%41"), "A");
}

TEST(HttpText, Chunks) {
  for (const auto& [size, head] : {std::pair(1, "1\r\n"), std::pair(255, "ff\r\n"), std::pair(70000, "11170\r\n")}) {
    const std::string body(size, 'x');
    std::string frame = std::string(kChunkHead, ' ') + body;
    const size_t begin = FrameChunk(&frame);
    EXPECT_EQ(frame.substr(begin), head + body + "\r\n");
  }
}

}  // namespace
}  // namespace linspec
