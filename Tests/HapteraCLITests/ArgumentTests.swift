import ArgumentParser
import HapteraHost
import Testing

@testable import HapteraCLI

@Suite struct ArgumentTests {
    private func parse<Command>(_ type: Command.Type, _ line: String) throws -> Command {
        let words = line.split(separator: " ").map(String.init)
        let command = try Storagectl.parseAsRoot(Storagectl.globalsLast(words))
        return try #require(command as? Command)
    }

    @Test func createTakesEverything() throws {
        let command = try parse(
            VolumeCommand.Create.self,
            "volume create vol-1 --size 10GiB --replicas 2 --node a --node a -o json --timeout 2m -q"
        )
        #expect(command.name.text == "vol-1")
        #expect(command.size.bytes == 10 << 30)
        #expect(command.replicas == 2)
        #expect(command.node.map(\.text) == ["a", "a"])
        #expect(command.options.output == .json)
        #expect(command.options.timeout.seconds == 120)
        #expect(command.options.quiet)
    }

    @Test func globalsMayComeFirst() throws {
        let command = try parse(
            VolumeCommand.Show.self, "-o json --server h:1 --context=c -q volume show vol")
        #expect(command.options.output == .json)
        #expect(command.options.server == "h:1")
        #expect(command.options.context == "c")
        #expect(command.name.text == "vol")
        #expect(Storagectl.globalsLast(["-o", "json"]) == ["-o", "json"])
        #expect(Storagectl.globalsLast(["--help"]) == ["--help"])
    }

    @Test(arguments: [
        "cluster up --dir /tmp/x --nodes 5", "cluster down", "cluster down --dir /x",
        "cluster status", "status", "volume create v --size 1MiB", "volume list --watch",
        "volume show v", "volume attach v --node n", "volume attach v", "volume detach v",
        "volume delete v", "replica list", "replica list v --watch", "node list -o wide",
        "node show n", "events --follow", "events --limit 5", "version", "completion bash",
        "completion zsh", "completion fish",
    ])
    func everyVerbIsThere(_ line: String) throws {
        _ = try parse((any ParsableCommand).self, line)
    }

    @Test(arguments: [
        "volume create Bad --size 1GiB", "volume create v --size 5k", "volume create v",
        "volume create v --size 1GiB --replicas 6", "volume create v --size 1GiB --replicas 0",
        "volume create v --size 1GiB --node _", "volume show", "volume show a/b",
        "volume list --server nohost", "volume list -o xml", "volume list --timeout 0",
        "cluster up", "cluster up --dir x --nodes 0", "events --limit 0", "nonsense",
        "completion tcsh",
    ])
    func usageErrorsAreStatusTwo(_ line: String) async {
        let words = line.split(separator: " ").map(String.init)
        #expect(await Storagectl.execute(words) == .usage)
    }

    @Test(
        arguments: [
            ("1048576", 1 << 20), ("10GiB", 10 << 30), ("10G", 10 << 30), ("10g", 10 << 30),
            ("1.5GiB", 3 << 29), ("1TiB", 1 << 40), ("4GB", 4_000_000_000), ("0.5KiB", 512),
        ] as [(String, UInt64)])
    func sizesAreRead(_ text: String, _ bytes: UInt64) {
        #expect(VolumeSize.parse(text) == bytes)
    }

    @Test(arguments: [
        "", "GiB", "-1GiB", "1 GiB", "1.GiB", ".5GiB", "1.2.3GiB", "1e9", "1XiB", "0x10",
        "99999999999999999999", "17179869184GiB", "0.3B", "١GiB",
    ])
    func nonsenseIsNoSize(_ text: String) {
        #expect(VolumeSize.parse(text) == nil)
    }

    @Test func sizesAreWritten() {
        #expect(VolumeSize.text(1 << 30) == "1GiB")
        #expect(VolumeSize.text(3 << 29) == "1.5GiB")
        #expect(VolumeSize.text(512) == "512B")
        #expect(VolumeSize.text(0) == "0B")
    }

    @Test(arguments: [
        ("a:1", "a", 1), ("127.0.0.1:65535", "127.0.0.1", 65535), ("[::1]:80", "::1", 80),
    ])
    func endpointsAreRead(_ text: String, _ host: String, _ port: Int) {
        let parsed = Names.hostAndPort(text)
        #expect(parsed?.host == host)
        #expect(parsed?.port == port)
        #expect(Names.endpoint(host: host, port: port) == text)
    }

    @Test(arguments: ["", "a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:+1", "::1:80", "a b:1"])
    func nonsenseIsNoEndpoint(_ text: String) {
        #expect(Names.hostAndPort(text) == nil)
    }
}
