#include "kernels/cpu/peak.h"

#include <gtest/gtest.h>

namespace linspec {
namespace {

// How fast is the machine's business; that the loops run with every instruction set and count what they do is ours.
TEST(PeakTest, EveryInstructionSetThatTheMachineHas) {
  for (const Isa isa : kIsas) {
    if (isa > DetectIsa()) continue;
    EXPECT_GT(MeasureMultiplyAddPeak(isa, DType::kF32, 1), 0) << IsaName(isa);
    EXPECT_GT(MeasureMultiplyAddPeak(isa, DType::kI8, 2), 0) << IsaName(isa);
    EXPECT_GT(MeasureReadBandwidth(isa, 2, 1 << 16), 0) << IsaName(isa);
    EXPECT_GT(MeasureReadBandwidth(isa, 1, 1), 0) << IsaName(isa);
  }
}

}  // namespace
}  // namespace linspec
