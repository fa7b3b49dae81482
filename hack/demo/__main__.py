"""``python -m hack.demo``: the whole demo, told step by step."""

import argparse
import subprocess
import sys
from pathlib import Path

from hack.cluster import ClusterError, choose
from hack.demo import ask, journey, marks, report, site
from hack.demo.kube import KubectlFailed, TookTooLong
from hack.demo.observe import ModelFailed
from hack.demo.story import Story

FAILURES = (
    KubectlFailed,
    TookTooLong,
    ModelFailed,
    ClusterError,
    subprocess.CalledProcessError,
)
NEXT = """
What to try next ({where}):
  kubectl get pm -n {namespace} -w                    # the row while load moves
  kubectl describe pm tiny-moe -n {namespace}         # conditions and decisions, with reasons
  kubectl patch pm tiny-moe -n {namespace} --type merge \\
    -p '{{"spec":{{"elasticity":{{"mode":"Manual","levelPercent":50}}}}}}'
  kubectl port-forward -n {namespace} service/tiny-moe 8080:80
  kubectl port-forward -n prism-monitoring service/prometheus 9090
  make demo-down                                      # remove everything
"""


def main() -> int:
    """Exit code 0 when every step succeeded."""
    parser = argparse.ArgumentParser(prog="python -m hack.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the report")
    options = parser.parse_args()
    story = Story()
    try:
        run(story, options.out)
    except FAILURES as problem:
        story.say(f"the demo failed: {problem}")
        return 1
    return 0


def run(story: Story, out: Path) -> None:
    place = site.bring_up(story, choose())
    site.install(place)
    with journey.serve_example(place) as served:
        with story.step("What the refactoring made"):
            quality = journey.show_artifact(place)
        with story.step("Ask the model through the openai client"):
            ask.show(served.watched.url, journey.MODEL, story.say)
        with story.step("Measure capacity at level 100 and at the floor"):
            journey.wait_for_metrics(place)
            capacities = journey.measure(place, served)
        with story.step("Load step, elastic"):
            elastic = journey.load_step(place, served, "Auto", capacities[0])
        with story.step("The same load step with elasticity.mode: Off"):
            off = journey.load_step(place, served, "Off", capacities[0])
        journey.ask_mode(place, "Auto")
        made = journey.record(place, served, capacities, (elastic, off), quality)
    story.say(report.summary(made))
    for line in marks.verdicts(made):
        story.say(line)
    story.say(f"report: {report.write(made, out)} and {out / 'report.png'}")
    story.say("kubectl get prismmodels -A")
    print(place.kube.run("get", "prismmodels", "-A"), flush=True)
    where = f"export KUBECONFIG={place.kube.environment.get('KUBECONFIG', '')}"
    print(NEXT.format(where=where, namespace=place.kube.namespace), flush=True)
    print(f"all of it took {story.elapsed:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
