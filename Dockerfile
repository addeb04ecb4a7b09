# One image per program:
#
#   docker build --target engine -t haptera/engine .
#
# The bases are arguments, so that a mirror or a pinned digest can stand in for them.
ARG BUILD_BASE=swift:6.3-bookworm
ARG RUNTIME_BASE=debian:bookworm-slim

# ---- build -------------------------------------------------------------------------------------
FROM ${BUILD_BASE} AS build-base
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        libaio-dev libsqlite3-dev libssl-dev liburing-dev pkg-config \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY Package.swift ./
COPY Sources Sources
COPY Tests Tests

# The data plane resolves no dependency and builds in a minute; the control plane takes many.
FROM build-base AS build-data
RUN HAPTERA_PLANE=data swift build -c release --static-swift-stdlib --product haptera-engine \
    && HAPTERA_PLANE=data swift build -c release --static-swift-stdlib --product haptera-replica \
    && strip .build/release/haptera-engine .build/release/haptera-replica

FROM build-base AS build-control
RUN swift build -c release --static-swift-stdlib --product haptera-controller \
    && swift build -c release --static-swift-stdlib --product haptera-node \
    && swift build -c release --static-swift-stdlib --product storagectl \
    && strip .build/release/haptera-controller .build/release/haptera-node .build/release/storagectl

# ---- run ---------------------------------------------------------------------------------------
FROM ${RUNTIME_BASE} AS runtime
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        libaio1 libsqlite3-0 libssl3 liburing2 libstdc++6 zlib1g \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10809 --home-dir /var/lib/haptera --create-home haptera
# Files a volume's data lives in; a file system that knows O_DIRECT.
VOLUME /var/lib/haptera
WORKDIR /var/lib/haptera
USER haptera
# An engine or replica that answers on its control socket is healthy: start it with
# --control /var/lib/haptera/control.sock.
COPY scripts/control /usr/bin/haptera-control

FROM runtime AS engine
COPY --from=build-data /source/.build/release/haptera-engine /usr/bin/
EXPOSE 10809
HEALTHCHECK --interval=10s --timeout=3s \
    CMD ["haptera-control", "/var/lib/haptera/control.sock", "ping"]
ENTRYPOINT ["haptera-engine"]

FROM runtime AS replica
COPY --from=build-data /source/.build/release/haptera-replica /usr/bin/
HEALTHCHECK --interval=10s --timeout=3s \
    CMD ["haptera-control", "/var/lib/haptera/control.sock", "ping"]
ENTRYPOINT ["haptera-replica"]

FROM runtime AS controller
COPY --from=build-control /source/.build/release/haptera-controller /usr/bin/
COPY --from=build-control /source/.build/release/storagectl /usr/bin/
HEALTHCHECK --interval=10s --timeout=5s \
    CMD ["storagectl", "--server", "127.0.0.1:7780", "cluster", "status", "--quiet"]
ENTRYPOINT ["haptera-controller"]

# The node agent starts engines and replicas, so it carries them. It listens nowhere: whether it
# lives is seen by the controller it reports to (`storagectl node list`).
FROM runtime AS node
COPY --from=build-data /source/.build/release/haptera-engine /usr/bin/
COPY --from=build-data /source/.build/release/haptera-replica /usr/bin/
COPY --from=build-control /source/.build/release/haptera-node /usr/bin/
HEALTHCHECK NONE
ENTRYPOINT ["haptera-node"]

FROM runtime AS storagectl
COPY --from=build-control /source/.build/release/storagectl /usr/bin/
HEALTHCHECK NONE
ENTRYPOINT ["storagectl"]
