# Carries examples/tiny-moe; its Job copies the model into the claim that `uri: pvc://...` names.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE}
COPY hack/images/copy_model.py /copy_model.py
COPY examples/tiny-moe /model
USER 65532:65532
ENTRYPOINT ["python", "/copy_model.py", "/model"]
