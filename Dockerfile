# Targets:
#   binary    only the driver: docker build --target binary --output dist .
#   manager   GitLab Runner with the driver, for a manager host that is itself a container
ARG NODE_IMAGE=node:22-bookworm-slim
ARG RUNNER_IMAGE=gitlab/gitlab-runner:v17.9.0

FROM ${NODE_IMAGE} AS build
WORKDIR /src
COPY package.json package-lock.json .npmrc ./
COPY .ci/install.mjs .ci/
RUN node .ci/install.mjs
COPY . .
# The build context has no git history. Pass the commit: --build-arg SOURCE_REVISION="$(git rev-parse --short=12 HEAD)"
ARG SOURCE_REVISION=unknown
RUN npm run --silent build && dist/fargate --version

FROM scratch AS binary
COPY --from=build /src/dist/fargate /src/dist/THIRD-PARTY-LICENSES /

FROM ${RUNNER_IMAGE} AS manager
RUN mkdir -p -m 0700 /opt/gitlab-runner/metadata && mkdir -p /opt/gitlab-runner/builds /opt/gitlab-runner/cache
COPY --from=build /src/dist/fargate /src/dist/THIRD-PARTY-LICENSES /opt/gitlab-runner/
