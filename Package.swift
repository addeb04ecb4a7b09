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

var products: [Product] = [
    .executable(name: "haptera-engine", targets: ["haptera-engine"]),
    .executable(name: "haptera-replica", targets: ["haptera-replica"]),
    .executable(name: "haptera-sim", targets: ["haptera-sim"]),
]
var dependencies: [Package.Dependency] = []
var targets: [Target] = [
    .target(name: "CHaptera", cSettings: [.unsafeFlags(["-O2", "-Wall", "-Werror"])]),
    .target(name: "CUring", linkerSettings: [.linkedLibrary("uring")]),
    .target(name: "CAio", linkerSettings: [.linkedLibrary("aio")]),
    .target(name: "COpenSSL", linkerSettings: [.linkedLibrary("crypto")]),
    .target(name: "HapteraCore", dependencies: ["CHaptera"], swiftSettings: strict),
    .target(
        name: "HapteraIO", dependencies: ["HapteraCore", "CUring", "CAio", "COpenSSL"],
        swiftSettings: strict),
    .target(
        name: "HapteraEngine", dependencies: ["HapteraCore", "HapteraIO"], swiftSettings: strict),
    .target(
        name: "HapteraReplica", dependencies: ["HapteraCore", "HapteraIO"], swiftSettings: strict),
    .target(
        name: "HapteraTesting", dependencies: ["HapteraCore", "HapteraIO"], swiftSettings: strict),
    .executableTarget(
        name: "haptera-engine", dependencies: ["HapteraEngine"], swiftSettings: strict),
    .executableTarget(
        name: "haptera-replica", dependencies: ["HapteraReplica"], swiftSettings: strict),
    .executableTarget(
        name: "haptera-sim", dependencies: ["HapteraTesting"], swiftSettings: strict),
    .testTarget(
        name: "HapteraCoreTests", dependencies: ["HapteraCore"], swiftSettings: strict),
    .testTarget(
        name: "TidyTests", exclude: ["long-functions.txt", "glossary.txt"], swiftSettings: strict),
]

let package = Package(
    name: "haptera", products: products, dependencies: dependencies, targets: targets)
