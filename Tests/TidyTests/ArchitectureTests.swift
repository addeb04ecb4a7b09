import Foundation
import Testing

/// Dependencies point down only, and the data plane stays free of what costs per request.
@Suite struct ArchitectureTests {
    private static let libc: Set = ["Glibc", "Musl"]
    /// Everything a data-plane target may import. A new entry is a decision.
    private static let allowed: [String: Set<String>] = [
        "HapteraCore": libc.union(["CHaptera"]),
        "HapteraIO": libc.union([
            "HapteraCore", "CHaptera", "CUring", "CAio", "COpenSSL", "Synchronization",
        ]),
        "HapteraEngine": libc.union(["HapteraCore", "HapteraIO", "Synchronization"]),
        "HapteraReplica": libc.union(["HapteraCore", "HapteraIO", "Synchronization"]),
        "HapteraTesting": libc.union([
            "HapteraCore", "HapteraIO", "HapteraEngine", "HapteraReplica",
        ]),
        "haptera-engine": libc.union(["HapteraCore", "HapteraIO", "HapteraEngine"]),
        "haptera-replica": libc.union(["HapteraCore", "HapteraIO", "HapteraReplica"]),
        "haptera-sim": libc.union(["HapteraCore", "HapteraTesting"]),
    ]

    private static func dataPlane() -> [(file: SourceFile, target: String)] {
        SourceTree.swift.compactMap { file in
            let parts = file.path.split(separator: "/")
            guard parts.count > 2, parts[0] == "Sources" else { return nil }
            let target = String(parts[1])
            return allowed[target] == nil ? nil : (file, target)
        }
    }

    @Test func everyDataPlaneTargetIsThere() {
        #expect(Set(Self.dataPlane().map(\.target)) == Set(Self.allowed.keys))
    }

    @Test func importsPointDown() {
        for (file, target) in Self.dataPlane() {
            for (index, line) in file.code.enumerated() {
                guard let match = line.firstMatch(of: #/(?:^|\s)import\s+(?:\w+\s+)?(\w+)\s*$/#)
                else { continue }
                #expect(
                    Self.allowed[target]?.contains(String(match.output.1)) == true,
                    "\(file.path):\(index + 1): \(target) must not import \(match.output.1)")
            }
        }
    }

    @Test func theDataPlaneHasNoTasks() {
        for (file, _) in Self.dataPlane() {
            for (index, line) in file.code.enumerated() {
                let match = line.firstMatch(of: #/(^|[^\w.])(async|await|actor|Task)\b/#)
                #expect(match == nil, "\(file.path):\(index + 1): \(match?.output.2 ?? "")")
            }
        }
    }

    /// The core decides and the shell acts: no clock, file, socket, thread or randomness in it.
    @Test func theCoreIsPure() {
        let calls = #/\b(clock_gettime|open|socket|pthread_create|getrandom|random|getenv)\s*\(/#
        for (file, target) in Self.dataPlane() where target == "HapteraCore" {
            for (index, line) in file.code.enumerated() {
                #expect(
                    line.firstMatch(of: calls) == nil, "\(file.path):\(index + 1): \(line)")
            }
        }
    }
}
