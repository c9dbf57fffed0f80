#!/usr/bin/env python3
"""Writes deploy/grafana/dashboards/*.json. A panel is one line here; the JSON beside it is what Grafana loads."""
import json
import pathlib

SELECT = 'instance=~"$instance"'


def rate(metric, by="", extra=""):
    return f"sum by ({by or 'instance'}) (rate({metric}{{{SELECT}{extra}}}[$__rate_interval]))"


def quantiles(metric, by=""):
    group = f"le, {by}" if by else "le"
    return [(f"histogram_quantile({q}, sum by ({group}) (rate({metric}_bucket{{{SELECT}}}[$__rate_interval])))",
             (f"{{{{{by}}}}} " if by else "") + name) for q, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))]


def mean(metric, by="instance"):
    return f"{rate(metric + '_sum', by)} / {rate(metric + '_count', by)}"


def gauge(metric, extra=""):
    return f"{metric}{{{SELECT}{extra}}}"


# title -> panels: (title, unit, [(expression, legend)], stacked)
DASHBOARDS = {
    "overview": ("linspec: overview", [
        ("Output tokens per second", "short", [(rate("linspec_generation_tokens_total"), "{{instance}}")], False),
        ("Requests running and waiting", "short", [(gauge("linspec_num_requests_running"), "running"),
                                                   (gauge("linspec_num_requests_waiting"), "waiting")], False),
        ("Time to first token", "s", quantiles("linspec_time_to_first_token_seconds"), False),
        ("Time per output token", "s", quantiles("linspec_request_time_per_output_token_seconds"), False),
        ("Requests by how they ended", "reqps",
         [(rate("linspec_request_success_total", "finished_reason"), "{{finished_reason}}")], True),
        ("Turned away, by reason", "reqps", [(rate("linspec_admission_rejected_total", "reason"), "{{reason}}")], True),
        ("Prompt tokens per second", "short", [(rate("linspec_prompt_tokens_total"), "{{instance}}")], False),
        ("HTTP answers by status", "reqps", [(rate("linspec_http_requests_total", "status"), "{{status}}")], True),
        ("gRPC answers by code", "reqps", [(rate("linspec_grpc_requests_total", "code"), "{{code}}")], True),
        ("Version and time since the start", "s",
         [(f"time() - {gauge('process_start_time_seconds')}", "{{instance}}"),
          ("sum by (instance, version) (linspec_build_info)", "{{instance}} {{version}}")], False),
    ]),
    "latency": ("linspec: latency", [
        ("Time to first token", "s", quantiles("linspec_time_to_first_token_seconds"), False),
        ("Gap between outputs", "s", quantiles("linspec_inter_token_latency_seconds"), False),
        ("End to end", "s", quantiles("linspec_e2e_request_latency_seconds"), False),
        ("Queue", "s", quantiles("linspec_request_queue_time_seconds"), False),
        ("Prefill (slot to first token)", "s", quantiles("linspec_request_prefill_time_seconds"), False),
        ("Decode (first token to end)", "s", quantiles("linspec_request_decode_time_seconds"), False),
        ("Where a step's time goes (seconds per second)", "short",
         [(rate("linspec_step_stage_seconds_sum", "stage"), "{{stage}}")], True),
        ("Mean time of a stage", "s", [(mean("linspec_step_stage_seconds", "stage"), "{{stage}}")], False),
        ("Pieces of answers: text and writes, mean time", "s",
         [(mean("linspec_response_stage_seconds", "stage"), "{{stage}}")], False),
        ("Slowest pieces: p99", "s",
         [(f"histogram_quantile(0.99, sum by (le, stage) "
           f"(rate(linspec_response_stage_seconds_bucket{{{SELECT}}}[$__rate_interval])))", "{{stage}}")], False),
        ("Prompt length", "short", quantiles("linspec_request_prompt_tokens"), False),
        ("Output length", "short", quantiles("linspec_request_generation_tokens"), False),
    ]),
    "speculation": ("linspec: speculation", [
        ("Tokens per verified draft, the bonus token included", "short",
         [(f"1 + {rate('linspec_spec_decode_num_accepted_tokens_total', 'drafter')}"
           f" / {rate('linspec_spec_decode_num_drafts_total', 'drafter')}", "{{drafter}}")], False),
        ("Share of drafted tokens accepted", "percentunit",
         [(f"{rate('linspec_spec_decode_num_accepted_tokens_total', 'drafter')}"
           f" / {rate('linspec_spec_decode_num_draft_tokens_total', 'drafter')}", "{{drafter}}")], False),
        ("Acceptance by depth", "percentunit",
         [(f"{rate('linspec_spec_decode_num_accepted_tokens_per_pos_total', 'position')}"
           f" / {rate('linspec_spec_decode_num_draft_tokens_per_pos_total', 'position')}", "depth {{position}}")], False),
        ("Engine is drafting", "short", [(gauge("linspec_speculation_on"), "{{instance}}")], False),
        ("Rows verified per step", "short",
         [(f"{rate('linspec_verify_rows_total')} / {rate('linspec_engine_steps_total')}", "{{instance}}")], False),
        ("Nodes per draft tree, root included", "short",
         [(f"{rate('linspec_spec_tree_nodes_total', 'drafter')}"
           f" / {rate('linspec_spec_decode_num_drafts_total', 'drafter')}", "{{drafter}}")], False),
        ("Drafted and thrown away, tokens per second", "short",
         [(f"{rate('linspec_spec_decode_num_draft_tokens_total', 'drafter')}"
           f" - {rate('linspec_spec_decode_num_accepted_tokens_total', 'drafter')}", "{{drafter}}")], False),
        ("Malformed draft trees", "short", [(rate("linspec_drafter_errors_total"), "{{instance}}")], False),
        ("Draft and verify, seconds per second", "short",
         [(rate("linspec_step_stage_seconds_sum", "stage", ',stage=~"draft|verify|accept|commit"'), "{{stage}}")], True),
    ]),
    "state": ("linspec: state and capacity", [
        ("State slots", "short", [(gauge("linspec_state_slots"), "{{state}}")], True),
        ("Share of slots in use", "percentunit",
         [(gauge("linspec_state_usage_ratio"), "{{instance}}")], False),
        ("Memory of states and weights (constant)", "bytes",
         [(gauge("linspec_state_bytes"), "states, {{tier}}"), (gauge("linspec_weight_bytes"), "weights")], True),
        ("Resident memory of the process", "bytes", [(gauge("process_resident_memory_bytes"), "{{instance}}")], False),
        ("State of one request, at any context length", "bytes",
         [(gauge("linspec_state_bytes_per_request"), "{{instance}}")], False),
        ("Prompt tokens found in the prefix cache", "percentunit",
         [(f"{rate('linspec_prefix_cache_hits_total')} / {rate('linspec_prefix_cache_queries_total')}", "{{instance}}")], False),
        ("States kept of earlier prompts", "short", [(gauge("linspec_prefix_cache_entries"), "{{instance}}")], False),
        ("Waiting: requests and prompt tokens", "short", [(gauge("linspec_num_requests_waiting"), "requests"),
                                                          (gauge("linspec_prompt_tokens_waiting"), "prompt tokens")], False),
        ("Rows per step", "short", quantiles("linspec_iteration_tokens_total"), False),
        ("Processors in use", "short", [(rate("process_cpu_seconds_total"), "{{instance}}")], False),
        ("Connections and open files", "short", [(gauge("linspec_http_connections_open"), "HTTP connections"),
                                                 (gauge("process_open_fds"), "open files")], False),
        ("Log lines lost per second", "short", [(rate("linspec_log_lines_lost_total"), "{{instance}}")], False),
    ]),
    "gpu": ("linspec: GPU", [
        ("Device memory, by what it holds", "bytes",
         [(gauge("linspec_gpu_memory_bytes", ',kind=~"weights|states|scratch"'), "{{gpu}} {{kind}}")], True),
        ("Device memory used, of all there is", "percentunit",
         [("sum by (instance, gpu) (" + gauge("linspec_gpu_memory_bytes", ',kind="used"') + ") / sum by (instance, gpu) ("
           + gauge("linspec_gpu_memory_bytes", ',kind="total"') + ")", "{{gpu}}")], False),
        ("Share of time the device is busy, by stage", "percentunit",
         [(rate("linspec_gpu_time_seconds_total", "instance, gpu, stage"), "{{gpu}} {{stage}}")], True),
        ("Device time per output token", "s",
         [(f"{rate('linspec_gpu_time_seconds_total')} / {rate('linspec_generation_tokens_total')}", "{{instance}}")], False),
        ("Devices", "short", [("sum by (instance, gpu, name) (" + gauge("linspec_gpu_info") + ")", "{{gpu}}: {{name}}")], False),
    ]),
}


def panel(index, spec):
    title, unit, targets, stacked = spec
    return {
        "id": index + 1, "type": "timeseries", "title": title,
        "datasource": {"type": "prometheus", "uid": "linspec-prometheus"},
        "gridPos": {"h": 8, "w": 12, "x": 12 * (index % 2), "y": 8 * (index // 2)},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {
            "fillOpacity": 20 if stacked else 8, "stacking": {"mode": "normal" if stacked else "none"}}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [{"refId": chr(65 + i), "expr": expression, "legendFormat": legend}
                    for i, (expression, legend) in enumerate(targets)],
    }


def dashboard(uid, title, panels):
    return {
        "uid": f"linspec-{uid}", "title": title, "tags": ["linspec"], "schemaVersion": 39, "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["linspec"], "title": "linspec", "asDropdown": True}],
        "templating": {"list": [{
            "name": "instance", "type": "query", "label": "instance", "includeAll": True, "multi": True, "allValue": ".*",
            "current": {"text": "All", "value": "$__all"}, "refresh": 2,
            "datasource": {"type": "prometheus", "uid": "linspec-prometheus"},
            "query": "label_values(linspec_build_info, instance)"}]},
        "panels": [panel(i, spec) for i, spec in enumerate(panels)],
    }


def text(board):
    """JSON with a line for each panel, so that a changed panel is a changed line."""
    fields = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in board.items() if name != "panels"]
    panels = ",\n".join("  " + json.dumps(one) for one in board["panels"])
    return "{\n" + ",\n".join(fields) + ',\n "panels": [\n' + panels + "\n ]\n}\n"


def main():
    folder = pathlib.Path(__file__).parent / "dashboards"
    for uid, (title, panels) in DASHBOARDS.items():
        (folder / f"{uid}.json").write_text(text(dashboard(uid, title, panels)))


if __name__ == "__main__":
    main()
