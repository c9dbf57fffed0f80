#!/usr/bin/env python3
"""Renders every Kustomize overlay and checks each object: core kinds against Kubernetes' own schemas (strict: an unknown field
is an error), custom ones against kubernetes/custom_schemas.yaml, and what no schema can know: ports, selectors, grace periods,
flags and metric names fit each other and the server.

usage: deploy/check_manifests.py LINSPEC_BINARY     needs kubectl 1.27 or newer and deploy/requirements.txt
"""
import pathlib
import re
import subprocess
import sys

import jsonschema
import kubernetes_validate
import yaml

HERE = pathlib.Path(__file__).parent
KUBERNETES_VERSION = "1.30"
NOT_FOR_PODS = {"latest", ""}


def render(overlay):
    result = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"check_manifests: {overlay}:\n{result.stderr}")
    return [item for item in yaml.safe_load_all(result.stdout) if item]


def schema_errors(item, custom):
    key = f"{item['apiVersion']}/{item['kind']}"
    try:
        if key in custom:
            jsonschema.validate(item["spec"], custom[key])
        else:
            kubernetes_validate.validate(item, KUBERNETES_VERSION, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return [f"{key}: {'.'.join(str(part) for part in error.path)}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{key}: no schema; add it to kubernetes/custom_schemas.yaml"]
    return []


def pod_errors(deployment, known_flags):
    spec = deployment["spec"]["template"]["spec"]
    container = spec["containers"][0]
    args = container["args"]
    flags = {arg[2:] for arg in args if arg.startswith("--")}
    drain = float(args[args.index("--drain-timeout") + 1])
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = [container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    security = container["securityContext"]
    checks = [
        (flags <= known_flags, f"unknown flags {sorted(flags - known_flags)}"),
        (spec["terminationGracePeriodSeconds"] >= pause + drain + 5, "the grace period ends before draining does"),
        (all(probe["port"] in ports for probe in probes), "a probe asks a port that is not there"),
        (probes[2]["path"] == "/health" and probes[1]["path"] == "/ready", "liveness must not ask what readiness asks"),
        (security["readOnlyRootFilesystem"] and security["capabilities"]["drop"] == ["ALL"]
         and not security["allowPrivilegeEscalation"] and spec["securityContext"]["runAsNonRoot"], "not hardened"),
        (container["image"].rpartition(":")[2] not in NOT_FOR_PODS and ":" in container["image"], "the image has no tag"),
        ("memory" in container["resources"]["limits"], "no memory limit"),
    ]
    return [message for good, message in checks if not good]


def fit_errors(items, known_metrics):
    """How objects refer to each other."""
    by_kind = {}
    for item in items:
        by_kind.setdefault(item["kind"], []).append(item)
    deployment = by_kind["Deployment"][0]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    service = by_kind["Service"][0]
    service_ports = {port["port"] for port in service["spec"]["ports"]}
    errors = []
    selectors = [("Service", service["spec"]["selector"])]
    selectors += [(kind, item["spec"].get("selector", item["spec"].get("podSelector", {})).get("matchLabels", {}))
                  for kind in ("PodMonitor", "PodDisruptionBudget", "NetworkPolicy") for item in by_kind.get(kind, [])]
    errors += [f"{kind}: does not select exactly our pods: {selector}" for kind, selector in selectors
               if not selector or not selector.items() <= labels.items()]
    errors += [f"Service: no container port {port['targetPort']}" for port in service["spec"]["ports"]
               if port["targetPort"] not in ports]
    errors += [f"PodMonitor: no port {endpoint['port']}" for item in by_kind.get("PodMonitor", [])
               for endpoint in item["spec"]["podMetricsEndpoints"] if endpoint["port"] not in ports]
    for route in by_kind.get("HTTPRoute", []) + by_kind.get("GRPCRoute", []):
        for backend in (backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]):
            if backend["name"] != service["metadata"]["name"] or backend["port"] not in service_ports:
                errors.append(f"{route['kind']}: no service {backend}")
    for autoscaler in by_kind.get("HorizontalPodAutoscaler", []):
        names = {metric["pods"]["metric"]["name"] for metric in autoscaler["spec"]["metrics"]}
        adapter = (HERE / "kubernetes/components/autoscaling/prometheus_adapter.yaml").read_text()
        errors += [f"autoscaler: the server has no metric {name}" for name in names if name not in known_metrics]
        errors += [f"autoscaler: prometheus_adapter.yaml does not serve {name}" for name in names if name not in adapter]
        if "replicas" in deployment["spec"]:
            errors.append("autoscaler: the deployment fixes its replicas")
    return errors


def main():
    help_text = subprocess.run([sys.argv[1], "help", "serve"], capture_output=True, text=True, check=True).stdout
    known_flags = set(re.findall(r"^  --([a-z-]+)", help_text, re.M))
    known_metrics = set(re.findall(r'"(linspec_\w+)"', (HERE.parent / "server/metrics.cc").read_text()))
    custom = yaml.safe_load((HERE / "kubernetes/custom_schemas.yaml").read_text())
    errors, count = [], 0
    overlays = sorted(path.parent for path in (HERE / "kubernetes/overlays").glob("*/kustomization.yaml"))
    for overlay in overlays:
        items = render(overlay)
        count += len(items)
        found = [error for item in items for error in schema_errors(item, custom)]
        found += [error for item in items if item["kind"] == "Deployment" for error in pod_errors(item, known_flags)]
        found += fit_errors(items, known_metrics)
        errors += [f"{overlay.name}: {error}" for error in found]
    for error in errors:
        print(error, file=sys.stderr)
    print(f"{count} objects of {len(overlays)} overlays, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
