# Two targets:
#   binary    only the driver:             docker build --target binary --output dist .
#   manager   GitLab Runner and the driver: docker build --target manager --tag fargate-manager .
# They need BuildKit, which is the default since Docker 23. Before that, set DOCKER_BUILDKIT=1.

# Builds the driver. An image without npm must be Debian 13 or later, whose packages have a recent Node.js.
ARG NODE_IMAGE=node:22-bookworm-slim
# The base of the manager: Debian 12 or later, or an image made from it.
ARG BASE_IMAGE=debian:bookworm-slim
# Where gitlab-runner comes from: an image with /usr/bin/gitlab-runner, or else a file in this directory whose name
# begins with gitlab-runner, such as gitlab-runner-linux-amd64.
ARG RUNNER_IMAGE=gitlab/gitlab-runner:v17.9.0
ARG RUNNER_FILE=""

FROM ${NODE_IMAGE} AS build
RUN command -v npm >/dev/null || { apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends nodejs npm >/dev/null; }
WORKDIR /src
COPY package.json package-lock.json .npmrc ./
COPY .ci/install.mjs .ci/
# For a package registry of your own: --secret id=npmrc,src=$HOME/.npmrc, and if its certificate comes from a private
# authority, --secret id=ca,src=ca.pem. Neither gets into an image.
RUN --mount=type=secret,id=npmrc,target=/root/.npmrc --mount=type=secret,id=ca \
    [ ! -f /run/secrets/ca ] || export NODE_EXTRA_CA_CERTS=/run/secrets/ca; node .ci/install.mjs
COPY .ci .ci/
COPY fargate.ts tsconfig.json LICENSE ./
# The build context has no git history. Pass the commit: --build-arg SOURCE_REVISION="$(git rev-parse --short=12 HEAD)"
ARG SOURCE_REVISION=unknown
RUN npm run --silent build && dist/fargate --version

FROM scratch AS binary
COPY --from=build /src/dist/fargate /src/dist/THIRD-PARTY-LICENSES /

FROM ${RUNNER_IMAGE} AS runner
FROM scratch AS runner-file
ARG RUNNER_FILE
COPY ${RUNNER_FILE} /usr/bin/gitlab-runner
# The stage `runner-file` if RUNNER_FILE is set, else `runner`.
FROM runner${RUNNER_FILE:+-file} AS runner-source

# The base is not RUNNER_IMAGE itself: that runs as root with an entry point of its own, and has git, docker-machine and
# other programs that a manager of Fargate tasks does not need. gitlab-runner is one static program.
FROM ${BASE_IMAGE} AS manager
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends ca-certificates >/dev/null \
 && rm -rf /var/lib/apt/lists/*
# The user id is fixed, because whoever mounts a volume needs it. Tokens and keys are in the two directories.
RUN groupadd --system --gid 999 gitlab-runner \
 && useradd --system --uid 999 --gid 999 --create-home --shell /usr/sbin/nologin gitlab-runner \
 && install -d /opt/gitlab-runner \
 && install -d -m 0700 -o gitlab-runner -g gitlab-runner /etc/gitlab-runner /opt/gitlab-runner/metadata
RUN --mount=type=bind,from=runner-source,target=/mnt \
    [ -f /mnt/usr/bin/gitlab-runner ] \
 || { echo "RUNNER_IMAGE has no /usr/bin/gitlab-runner, and a manager is of no use without it" >&2; exit 1; }; \
    install /mnt/usr/bin/gitlab-runner /usr/bin/gitlab-runner && gitlab-runner --version
COPY --from=build /src/dist/fargate /src/dist/THIRD-PARTY-LICENSES /opt/gitlab-runner/
RUN /opt/gitlab-runner/fargate --version

USER 999:999
WORKDIR /home/gitlab-runner
ENV CONFIG_FILE=/etc/gitlab-runner/config.toml
# All that is written to. These stay writable if the root file system is read-only; on ECS, mount volumes here.
VOLUME ["/etc/gitlab-runner", "/opt/gitlab-runner/metadata", "/tmp"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/gitlab-runner/fargate", "manager", "--"]
# Arguments of gitlab-runner. Those of other images work as well, such as run --user=gitlab-runner.
CMD ["run"]
