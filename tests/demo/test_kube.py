"""What the demo does with kubectl, against a script in its place."""

from pathlib import Path

from hack.demo.kube import Kube, endpoint, wait_until

KUBECTL = """#!/bin/sh
case "$*" in
*"get service"*) echo '{"spec": {"clusterIP": "127.0.0.1"}}' ;;
*port-forward*)
  echo "Forwarding from 127.0.0.1:40123 -> 8000"
  for _ in $(seq 4000); do echo "Handling connection for 40123"; done
  touch "$(dirname "$0")/all-said"
  exec sleep 60 ;;
esac
"""


def test_a_port_forward_may_say_more_than_a_pipe_holds(tmp_path: Path) -> None:
    program = tmp_path / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    kube = Kube(str(program), "helm", {}, "test", "prism-demo")
    with endpoint(kube, "tiny-moe", 1) as url:  # nobody listens on port 1
        assert url == "http://127.0.0.1:40123"
        said = tmp_path / "all-said"
        wait_until(lambda: said.exists() or None, 10, "end of what kubectl has to say")
