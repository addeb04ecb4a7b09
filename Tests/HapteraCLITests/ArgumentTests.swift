import ArgumentParser
import HapteraAPI
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
        #expect(command.size?.bytes == 10 << 30)
        #expect(command.replicas == 2)
        #expect(command.node.map(\.text) == ["a", "a"])
        #expect(command.options.output == .json)
        #expect(command.options.timeout.seconds == 120)
        #expect(command.options.quiet)
    }

    /// Size and copies are the snapshot's unless they are given.
    @Test func createTakesASnapshotToBeginAs() throws {
        func request(_ line: String) throws -> Haptera_V1_CreateVolumeRequest {
            try parse(VolumeCommand.Create.self, "volume create new " + line).request
        }
        let clone = try request("--from vol@Before-1.0 --node a --label k=v --min-in-sync 2")
        #expect(clone.name == "new")
        #expect(clone.sourceVolume == "vol" && clone.sourceSnapshot == "Before-1.0")
        #expect(clone.sizeBytes == 0 && clone.replicas == 0)
        #expect(clone.nodes == ["a"] && clone.labels == ["k": "v"])
        #expect(clone.settings.minInSync == 2)
        let larger = try request("--from=vol@s --size 20GiB --replicas 2")
        #expect(larger.sizeBytes == 20 << 30 && larger.replicas == 2)
        let empty = try request("--size 1GiB")
        #expect(empty.sourceVolume.isEmpty && empty.sourceSnapshot.isEmpty)
        #expect(empty.sizeBytes == 1 << 30 && empty.replicas == 3)
    }

    @Test(arguments: [
        ("", "how large? Give --size SIZE, or --from VOLUME@SNAPSHOT"),
        ("--from vol", "'vol' names no snapshot: write VOLUME@SNAPSHOT"),
        ("--from vol@", "'' is no snapshot name"), ("--from @s", "'' is no name"),
        ("--from Vol@s", "'Vol' is no name"), ("--from vol@.s", "'.s' is no snapshot name"),
        ("--from vol@a@b", "'a@b' is no snapshot name"), ("--from -v@s", "'-v' is no name"),
        ("--from vol@s --replicas 0", "a volume has 1 to 5 replicas, not 0"),
        ("--from vol@s --size 5k", "'5k' is no volume size"),
    ])
    func whatIsWrongWithACreateIsSaid(_ line: String, _ words: String) {
        let typed = ("volume create new " + line).split(separator: " ").map(String.init)
        let error = #expect(throws: (any Error).self) { _ = try Storagectl.parseAsRoot(typed) }
        let message = error.map { Storagectl.message(for: $0) } ?? ""
        #expect(message.contains(words), "\(message)")
    }

    /// Each mistake has its own words, wherever a size is typed.
    @Test(arguments: [
        ("0", "it is zero: the least is 1MiB"), ("0GiB", "it is zero: the least is 1MiB"),
        ("-1", "it is negative"), ("-2GiB", "it is negative"),
        ("4KiB", "it is too small: the least is 1MiB"),
        ("5000", "it is too small: the least is 1MiB"),
        ("2PiB", "it is too large: the most is 1PiB"),
        ("99999999999999999999", "it is too large: the most is 1PiB"),
        ("17179869184GiB", "it is too large: the most is 1PiB"),
        ("1000000001", "it is no multiple of 4096 bytes; the next one is 1000001536"),
        ("1.5", "it is no whole number of bytes"), ("1.0000001GiB", "with 6 decimals at most"),
        ("big", "it is no number with a unit, as in 10GiB"),
        ("10X", "it is no number with a unit, as in 10GiB"),
        ("1e9", "it is no number with a unit, as in 10GiB"),
        ("1.2.3GiB", "it is no number with a unit, as in 10GiB"),
    ])
    func whatIsWrongWithASizeIsSaid(_ size: String, _ words: String) {
        for line in [
            ["volume", "create", "v", "--size", size],
            ["volume", "create", "v", "--from", "w@s", "--size", size],
            ["volume", "resize", "v", size], ["-o", "json", "volume", "resize", "v", size],
        ] {
            let error = #expect(throws: (any Error).self) {
                _ = try Storagectl.parseAsRoot(Storagectl.globalsLast(line))
            }
            let message = error.map { Storagectl.message(for: $0) } ?? ""
            #expect(message.contains("'\(size)' is no volume size: "), "\(line): \(message)")
            #expect(message.contains(words), "\(line): \(message)")
        }
    }

    /// It would be taken for the snapshots' name.
    @Test func aVolumeBesideAGroupIsRefused() throws {
        let error = #expect(throws: (any Error).self) {
            try parse(SnapshotCommand.Create.self, "snapshot create data --group data,logs")
        }
        let message = error.map { Storagectl.message(for: $0) } ?? ""
        #expect(
            message.contains(
                "'data' is a volume of the group, and stands where the snapshots' name does"),
            "\(message)")
    }

    @Test func snapshotDeleteAsksUnlessTold() throws {
        let command = try parse(SnapshotCommand.Delete.self, "snapshot delete vol Before-1.0")
        #expect(command.volume.text == "vol")
        #expect(command.name.text == "Before-1.0")
        #expect(!command.yes)
        #expect(try parse(SnapshotCommand.Delete.self, "snapshot delete vol s --yes").yes)
    }

    @Test func labelsAreChanged() throws {
        let volume = try parse(
            VolumeCommand.SetLabels.self, "volume label v a=1 b- example.com/c= d-"
        ).request
        #expect(volume.name == "v" && volume.set == ["a": "1", "example.com/c": ""])
        #expect(volume.remove == ["b", "d"])
        let snapshot = try parse(
            SnapshotCommand.SetLabels.self, "snapshot label v Before-1.0 a=1 b- -o json"
        ).request
        #expect(snapshot.volume == "v" && snapshot.name == "Before-1.0")
        #expect(snapshot.set == ["a": "1"] && snapshot.remove == ["b"])
        #expect(
            Presentation.labelled(["b": "", "a": "1"], "volume v") == "labels of volume v: a=1, b=")
        #expect(Presentation.labelled([:], "snapshot s of volume v").hasSuffix("volume v: none"))
    }

    /// One word of the shell, with its spaces and commas.
    @Test func selectorsAreTakenAsTheyAre() throws {
        let text = "tier in (a, b),app notin (,x)"
        for words in [["volume", "list"], ["snapshot", "list", "v"]] {
            let command = try Storagectl.parseAsRoot(words + ["--selector", text])
            let selector =
                (command as? VolumeCommand.List)?.selector
                ?? (command as? SnapshotCommand.List)?.selector
            #expect(selector?.text == text)
        }
        let error = #expect(throws: (any Error).self) {
            _ = try Storagectl.parseAsRoot(["volume", "list", "--selector", "tier in (a,b"])
        }
        let message = error.map { Storagectl.message(for: $0) } ?? ""
        #expect(
            message.contains("selector, character 13: it ends where ',' or ')' should be"),
            "\(message)")
    }

    /// A value that begins with a hyphen is a wrong value, not a missing one.
    @Test(arguments: [
        ("volume create v --size -2GiB", "'-2GiB' is no volume size"),
        ("volume update v --lease -5s", "'-5s' is no length of time"),
        ("chaos run --volume v --for -5s", "'-5s' is no time"),
        ("chaos run --volume v --for 2h", "--for is 1s to 1h"),
    ])
    func negativeValuesAreNamed(_ line: String, _ words: String) {
        let error = #expect(throws: (any Error).self) {
            _ = try Storagectl.parseAsRoot(line.split(separator: " ").map(String.init))
        }
        #expect(error.map { Storagectl.message(for: $0) }?.contains(words) == true)
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
        "node show n", "node update n --overcommit 200% --reserve 10GiB",
        "node update n --overcommit none", "node update n --reserve 0", "events --follow",
        "events --limit 5", "version", "completion bash",
        "completion zsh", "completion fish", "volume update v --io-timeout 30s",
        "volume update v --detect-zeroes on", "volume create v --size 1GiB --detect-zeroes off",
        "volume update v --min-in-sync 2 --lease 1s --removal-deadline 5s",
        "volume create v --size 1GiB --stale-replica-timeout 0", "volume accept-loss v --yes",
        "volume detach v --force --yes", "replica rebuild-status",
        "replica rebuild-status v --watch",
        "replica replace v 00000000000000a1 --node n --wait",
        "replica delete v 00000000000000a1 --discard-kept --yes",
        "snapshot create v", "snapshot create v Before-1.0", "snapshot list v --watch",
        "snapshot show v s -o json", "snapshot delete v s", "snapshot delete v s --yes -o json",
        "snapshot diff v a", "snapshot diff v a b --summary -o json", "snapshot mount-info v s",
        "snapshot create --group a,b,c", "snapshot create --group a,b Before-1.0 --label k=v",
        "snapshot revert v s --keep before --yes", "snapshot revert v s",
        "snapshot export v s file --format qcow2 --force", "snapshot export v s -",
        "snapshot export v s - --format qcow2",
        "volume create v --size 1GiB --label a=1 --label example.com/b=",
        "volume create v --from w@s", "volume create v --from w@s --size 1GiB --replicas 2",
        "volume label v a=1 b- example.com/c=x", "volume list --selector a=1,!b",
        "snapshot create v s --label a=1", "snapshot list v --selector a!=1",
        "schedule create s --cron @hourly --snapshot --retain 24 --all", "schedule list --watch",
        "schedule show s", "schedule pause s", "schedule resume s", "schedule delete s -q",
        "schedule update s --retain 3 -o json", "snapshot label v s a=1 b- example.com/c=",
    ])
    func everyVerbIsThere(_ line: String) throws {
        _ = try parse((any ParsableCommand).self, line)
    }

    @Test(arguments: [
        "volume create Bad --size 1GiB", "volume create v --size 5k", "volume create v",
        "volume create v --size 1GiB --replicas 6", "volume create v --size 1GiB --replicas 0",
        "volume create v --size 1GiB --node _", "volume show", "volume show a/b",
        "volume list --server nohost", "volume list -o xml", "volume list --timeout 0",
        "node update n", "node update --reserve 1GiB", "node update n --overcommit 0",
        "node update n --overcommit 100001", "node update n --overcommit 1.5",
        "node update n --reserve 2PiB", "node update n --reserve none",
        "cluster up", "cluster up --dir x --nodes 0", "events --limit 0", "nonsense",
        "completion tcsh", "volume update v", "volume update v --lease soon",
        "replica replace v a1", "replica delete v", "volume create v --size 1GiB --io-timeout -1",
        "volume update v --detect-zeroes yes", "volume update v --detect-zeroes",
        "snapshot create", "snapshot create v .s", "snapshot create v a@b", "snapshot list",
        "snapshot create V s", "snapshot show v", "snapshot delete v", "snapshot delete V s",
        "snapshot delete v .s", "snapshot delete v s t", "snapshot diff v", "snapshot diff v a b c",
        "snapshot export v s", "snapshot export v s d/",
        "snapshot create --group a,b s t", "snapshot create --group a,,b",
        "snapshot create --group A",
        "snapshot create --group a,b,a", "snapshot revert v", "snapshot revert v s --keep .k",
        "snapshot revert v a/b",
        "snapshot export v s f --format vmdk", "snapshot mount-info v",
        "volume create v --size 1GiB --label a", "volume create v --size 1GiB --label a-",
        "volume create v --size 1GiB --label a=1 --label a=2", "volume label v", "volume label v a",
        "volume label v a=1 a-", "volume label v haptera.io/a=1", "volume list --selector a,",
        "snapshot create v s --label haptera.io/schedule=x", "snapshot list v --selector =",
        "volume create v --from w", "volume create v --from w@s@t", "volume create --from w@s",
        "snapshot label v", "snapshot label v s", "snapshot label v s a", "snapshot label v .s a=1",
        "snapshot label v s a=1 a-", "snapshot label v s a=1 a=1", "snapshot label V s a=1",
        "snapshot label v s haptera.io/schedule=x", "snapshot label v s haptera.io/schedule-",
        "schedule update s", "schedule update --retain 1", "schedule update s --cron @never",
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

    @Test(
        arguments: [
            ("0", 0), ("3", 3000), ("500ms", 500), ("3s", 3000), ("30m", 1_800_000),
            ("2h", 7_200_000), ("7d", 604_800_000),
        ] as [(String, UInt64)])
    func durationsAreRead(_ text: String, _ milliseconds: UInt64) {
        #expect(Durations.parse(text) == milliseconds)
    }

    @Test(arguments: ["", "s", "1.5s", "-1s", "1 s", "1y", "99999999999999999999", "1ms5"])
    func nonsenseIsNoDuration(_ text: String) {
        #expect(Durations.parse(text) == nil)
    }

    @Test func durationsAreWritten() {
        #expect(Durations.text(1500) == "1500ms")
        #expect(Durations.text(1_800_000) == "30m")
        #expect(Durations.rough(59_999) == "59s")
        #expect(Durations.rough(61_000) == "1m 1s")
        #expect(Durations.rough(3_660_000) == "1h 1m")
        #expect(Durations.rough(90_000_000) == "1d 1h")
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
