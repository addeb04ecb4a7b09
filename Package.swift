// swift-tools-version: 6.2
import PackageDescription

// The control plane needs gRPC, protobuf and SQLite, which take many minutes to build on a small
// machine. `HAPTERA_PLANE=data` leaves those targets and their dependencies out, so that the data
// plane resolves nothing and builds in seconds. Use a scratch path of its own for each setting.
let dataPlaneOnly = Context.environment["HAPTERA_PLANE"] == "data"

let strict: [SwiftSetting] = [
    .swiftLanguageMode(.v6),
    .strictMemorySafety(),
    .treatAllWarnings(as: .error),
    .enableUpcomingFeature("MemberImportVisibility"),
]
// The data plane is single-threaded per reactor and runs its tests in debug, where exclusive access
// is checked; in release the checks would be a fifth of the user instructions of an I/O.
let hot: [SwiftSetting] =
    strict + [
        .unsafeFlags(
            ["-enforce-exclusivity=unchecked", "-cross-module-optimization"],
            .when(configuration: .release)),
        // Regular expressions are not used here, and their libraries take 0.9 MiB of each process.
        .unsafeFlags(["-Xfrontend", "-disable-implicit-string-processing-module-import"]),
    ]

var products: [Product] = [
    .executable(name: "haptera-engine", targets: ["haptera-engine"]),
    .executable(name: "haptera-replica", targets: ["haptera-replica"]),
    .executable(name: "haptera-sim", targets: ["haptera-sim"]),
]
var dependencies: [Package.Dependency] = []
var targets: [Target] = [
    .target(name: "CHaptera", cSettings: [.unsafeFlags(["-O2", "-Wall", "-Werror"])]),
    .target(name: "CUring", dependencies: ["CHaptera"], linkerSettings: [.linkedLibrary("uring")]),
    .target(name: "CAio", dependencies: ["CHaptera"], linkerSettings: [.linkedLibrary("aio")]),
    .target(name: "CAllocations"),
    .target(name: "COpenSSL", linkerSettings: [.linkedLibrary("crypto")]),
    .target(name: "HapteraCore", dependencies: ["CHaptera"], swiftSettings: hot),
    .target(
        name: "HapteraIO", dependencies: ["HapteraCore", "CHaptera", "CUring", "CAio", "COpenSSL"],
        swiftSettings: hot),
    .target(
        name: "HapteraEngine", dependencies: ["HapteraCore", "HapteraIO"], swiftSettings: hot),
    .target(
        name: "HapteraReplica", dependencies: ["HapteraCore", "HapteraIO"], swiftSettings: hot),
    .target(
        name: "HapteraTesting", dependencies: ["HapteraCore", "HapteraIO"], swiftSettings: strict),
    .executableTarget(
        name: "haptera-engine", dependencies: ["HapteraEngine"], swiftSettings: hot),
    .executableTarget(
        name: "haptera-replica", dependencies: ["HapteraReplica"], swiftSettings: hot),
    .executableTarget(
        name: "haptera-sim", dependencies: ["HapteraTesting"], swiftSettings: strict),
    .testTarget(
        name: "SimulationTests", dependencies: ["HapteraCore", "HapteraTesting"],
        exclude: ["seeds.known"], swiftSettings: strict),
    .testTarget(
        name: "HapteraCoreTests",
        dependencies: ["HapteraCore", "CHaptera", "HapteraTesting", "CAllocations"],
        swiftSettings: strict),
    .testTarget(
        name: "HapteraReplicaTests", dependencies: ["HapteraReplica", "HapteraCore", "HapteraIO"],
        swiftSettings: strict),
    .testTarget(
        name: "HapteraIOTests", dependencies: ["HapteraIO", "CAllocations", "CHaptera"],
        swiftSettings: strict),
    .testTarget(
        name: "HapteraEngineTests",
        dependencies: ["HapteraEngine", "HapteraTesting", "CAllocations"], swiftSettings: strict),
    .testTarget(
        name: "TidyTests", exclude: ["long-functions.txt", "glossary.txt"], swiftSettings: strict),
]

if !dataPlaneOnly {
    dependencies += [
        .package(url: "https://github.com/grpc/grpc-swift-2", exact: "2.4.3"),
        .package(url: "https://github.com/grpc/grpc-swift-nio-transport", exact: "2.9.2"),
        .package(url: "https://github.com/grpc/grpc-swift-protobuf", exact: "2.4.1"),
        .package(url: "https://github.com/apple/swift-protobuf", exact: "1.39.0"),
        .package(url: "https://github.com/apple/swift-nio", exact: "2.101.2"),
        .package(url: "https://github.com/apple/swift-log", exact: "1.16.2"),
        .package(url: "https://github.com/apple/swift-argument-parser", exact: "1.8.2"),
        .package(url: "https://github.com/swift-server/swift-service-lifecycle", exact: "2.13.0"),
        .package(url: "https://github.com/groue/GRDB.swift", exact: "7.10.0"),
    ]
    let grpc: [Target.Dependency] = [
        .product(name: "GRPCCore", package: "grpc-swift-2"),
        .product(name: "GRPCProtobuf", package: "grpc-swift-protobuf"),
        .product(name: "SwiftProtobuf", package: "swift-protobuf"),
    ]
    let grpcTransport: Target.Dependency = .product(
        name: "GRPCNIOTransportHTTP2Posix", package: "grpc-swift-nio-transport")
    let arguments: Target.Dependency = .product(
        name: "ArgumentParser", package: "swift-argument-parser")
    let lifecycle: Target.Dependency = .product(
        name: "ServiceLifecycle", package: "swift-service-lifecycle")
    let logging: Target.Dependency = .product(name: "Logging", package: "swift-log")
    products += [
        .executable(name: "haptera-controller", targets: ["haptera-controller"]),
        .executable(name: "haptera-node", targets: ["haptera-node"]),
        .executable(name: "storagectl", targets: ["storagectl"]),
    ]
    targets += [
        // Generated by scripts/generate-protos, so our own warning policy does not apply.
        .target(
            name: "HapteraAPI", dependencies: grpc, swiftSettings: [.swiftLanguageMode(.v6)]),
        // Processes, sockets and files of the host, for whoever starts or stops our programs.
        .target(name: "CHost"),
        .target(name: "HapteraHost", dependencies: ["CHost"], swiftSettings: strict),
        .target(
            name: "HapteraControl",
            dependencies: grpc + [
                "HapteraAPI", "HapteraCore", "HapteraHost", arguments, grpcTransport, lifecycle,
                logging,
                .product(name: "UnixSignals", package: "swift-service-lifecycle"),
                .product(name: "GRDB", package: "GRDB.swift"),
                .product(name: "NIOCore", package: "swift-nio"),
                .product(name: "NIOPosix", package: "swift-nio"),
            ],
            swiftSettings: strict),
        .executableTarget(
            name: "haptera-controller",
            dependencies: ["HapteraControl", "HapteraHost", arguments, lifecycle, logging],
            swiftSettings: strict),
        .executableTarget(
            name: "haptera-node",
            dependencies: ["HapteraControl", "HapteraHost", arguments, lifecycle, logging],
            swiftSettings: strict),
        .target(
            name: "HapteraCLI",
            dependencies: grpc + [
                "HapteraAPI", "HapteraCore", "HapteraHost", "HapteraTesting", arguments,
                grpcTransport,
            ],
            swiftSettings: strict),
        .executableTarget(
            name: "storagectl", dependencies: ["HapteraCLI", arguments], swiftSettings: strict),
        .testTarget(
            name: "HapteraControlTests",
            dependencies: [
                "HapteraControl", "HapteraAPI", "HapteraCore", "HapteraHost", logging,
                .product(name: "GRDB", package: "GRDB.swift"),
                .product(name: "NIOCore", package: "swift-nio"),
                .product(name: "NIOPosix", package: "swift-nio"),
            ],
            exclude: ["Fakes"], swiftSettings: strict),
        .testTarget(
            name: "HapteraCLITests",
            dependencies: ["HapteraCLI", "HapteraAPI", "HapteraCore", "HapteraHost", arguments]
                + grpc,
            exclude: ["Fakes"], swiftSettings: strict),
    ]
}

let package = Package(
    name: "haptera", products: products, dependencies: dependencies, targets: targets)
