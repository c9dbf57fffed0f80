// The figures of a run: numbers under the field names of `vllm bench serve`, a table for the terminal, and an HTML
// page.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "loadtest/options.h"
#include "loadtest/runner.h"
#include "loadtest/wire_text.h"

namespace linspec::loadtest {

nlohmann::ordered_json ReportJson(const RunResult& result, const Options& options, const std::string& model,
                                  const SpeculationCounters& speculation);
// metrics: which latencies to show, e.g. "ttft,tpot".
std::string ReportTable(const nlohmann::ordered_json& report, std::string_view metrics);
// One file without scripts or outside resources; plots are SVG.
std::string ReportHtml(const nlohmann::ordered_json& report, const RunResult& result);

}  // namespace linspec::loadtest
