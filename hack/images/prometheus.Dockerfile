# Prometheus for the demo on a machine without a registry: Debian's binary, on the demo's base.
ARG BASE=debian:bookworm-slim

FROM ${BASE}
COPY prometheus /usr/local/bin/prometheus
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["prometheus"]
