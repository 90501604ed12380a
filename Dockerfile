# JAX=jax[cuda12]==0.10.2 as a build argument adds JAX's build for NVIDIA's GPUs. See tests/README.md.
FROM python:3.11.13-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends make libegl1 libosmesa6 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home user && install --directory --owner user /home/user/project /home/user/project/results
USER user
WORKDIR /home/user/project
# First only what is installed, so that a change to the rest installs nothing again.
COPY --chown=user requirements.txt pyproject.toml Makefile ./
COPY --chown=user harness/__init__.py harness/
COPY --chown=user harness/mujoco210 harness/mujoco210/
ARG JAX
RUN make install && if [ -n "$JAX" ]; then .venv/bin/pip install --quiet --no-cache-dir "$JAX"; fi
COPY --chown=user . .
RUN touch .venv/installed  # newer than the copied files, or make would install again
CMD ["make", "demo"]
