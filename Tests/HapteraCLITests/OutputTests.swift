import ArgumentParser
import Foundation
import GRPCCore
import HapteraAPI
import HapteraHost
import Testing

@testable import HapteraCLI

/// The output is an interface: these texts change only with its documentation.
@Suite struct OutputTests {
    private static func volume() -> Haptera_V1_Volume {
        var volume = Haptera_V1_Volume()
        volume.name = "vol"
        volume.id = "00112233445566778899aabbccddeeff"
        volume.sizeBytes = 1 << 30
        volume.state = .attached
        volume.robustness = .degraded
        volume.reason = "replica 00000000000000b2 on node node-2 is absent"
        volume.epoch = 7
        volume.engine.pid = 42
        volume.engine.node = "node-1"
        volume.engine.uri = "nbd://127.0.0.1:20000/vol"
        volume.engine.unixUri = "nbd+unix:///vol?socket=/d/e.nbd"
        volume.engine.connections = 2
        volume.replicaCount = 2
        volume.allocatedBytes = 3 << 29
        volume.exclusiveBytes = 1 << 30
        volume.reclaimableBytes = 0
        volume.labels = ["app": "db", "example.com/tier": ""]
        volume.settings.minInSync = 1
        volume.settings.leaseMilliseconds = 500
        volume.settings.removalDeadlineMilliseconds = 3000
        volume.settings.staleReplicaTimeoutMilliseconds = 1_800_000
        for number in 1...2 {
            var replica = Haptera_V1_Replica()
            replica.id = "00000000000000b\(number)"
            replica.volume = "vol"
            replica.node = "node-\(number)"
            replica.state = number == 1 ? .inSync : .absent
            replica.inSync = number == 1
            replica.pid = number == 1 ? 43 : 0
            replica.address = "127.0.0.1:2000\(number)"
            replica.directory = "/d/node-\(number)"
            volume.replicas.append(replica)
        }
        return volume
    }

    @Test func nodesAsJSONAndText() {
        var node = Haptera_V1_Node()
        node.name = "node-1"
        node.ready = true
        node.address = "127.0.0.1"
        node.directory = "/d"
        node.version = "1"
        node.pid = 7
        node.capacityBytes = 100 << 30
        node.availableBytes = 1 << 30
        node.allocatedBytes = 3 << 30
        node.promisedBytes = 150 << 30
        node.reserveBytes = 2 << 30
        node.replicas = 4
        node.engines = 1
        let free = #"""
            {"name":"node-1","ready":true,"conditions":[],"address":"127.0.0.1","directory":"/d",\#
            "version":"1","pid":7,"capacityBytes":107374182400,"availableBytes":1073741824,\#
            "allocatedBytes":3221225472,"promisedBytes":161061273600,"overcommitPercent":null,\#
            "reserveBytes":2147483648,"replicas":4,"engines":1,"lastSeen":null}
            """#
        #expect(Presentation.value(node).json(pretty: false) == free)
        node.conditions = [.lowSpace]
        node.overcommitPercent = 200
        let limited = Presentation.value(node).json(pretty: false)
        #expect(limited.contains(#""conditions":["lowSpace"]"#))
        #expect(limited.contains(#""overcommitPercent":200"#))
        #expect(VolumeSize.percent(150, of: 1001) == 1501)
        #expect(VolumeSize.percent(100_000, of: .max) == .max)
        #expect(
            Presentation.table([node], wide: false).text == """
                NAME    READY  CONDITIONS  ADDRESS    REPLICAS  ENGINES  CAPACITY  AVAILABLE  \
                ALLOCATED  PROMISED
                node-1  yes    lowSpace    127.0.0.1  4         1        100GiB    1GiB       \
                3GiB       150GiB
                """)
        #expect(
            Presentation.details(node).contains(
                """
                capacity:    100GiB, 1GiB available
                allocated:   3GiB by 4 replicas
                promised:    150GiB of at most 200GiB
                limits:      overcommit 200%, reserve 2GiB
                """))
    }

    private static let volumeJSON = """
        {
          "name": "vol",
          "id": "00112233445566778899aabbccddeeff",
          "sizeBytes": 1073741824,
          "state": "attached",
          "robustness": "degraded",
          "reason": "replica 00000000000000b2 on node node-2 is absent",
          "conditions": [],
          "epoch": 7,
          "engine": {
            "pid": 42,
            "node": "node-1",
            "uri": "nbd://127.0.0.1:20000/vol",
            "unixURI": "nbd+unix:///vol?socket=/d/e.nbd",
            "connections": 2,
            "rebuildDone": 0,
            "rebuildTotal": 0,
            "restarts": 0
          },
          "replicas": [
            {
              "id": "00000000000000b1",
              "node": "node-1",
              "state": "inSync",
              "inSync": true,
              "pid": 43,
              "address": "127.0.0.1:20001",
              "directory": "/d/node-1",
              "allocatedBytes": 0,
              "restarts": 0,
              "reason": null,
              "replaces": null,
              "leaving": false,
              "temporary": false
            },
            {
              "id": "00000000000000b2",
              "node": "node-2",
              "state": "absent",
              "inSync": false,
              "pid": null,
              "address": "127.0.0.1:20002",
              "directory": "/d/node-2",
              "allocatedBytes": 0,
              "restarts": 0,
              "reason": null,
              "replaces": null,
              "leaving": false,
              "temporary": false
            }
          ],
          "replicaCount": 2,
          "snapshotCount": 0,
          "allocatedBytes": 1610612736,
          "exclusiveBytes": 1073741824,
          "reclaimableBytes": 0,
          "stuckBytes": null,
          "originVolume": null,
          "originSnapshot": null,
          "filling": null,
          "settings": {
            "minInSync": 1,
            "ioTimeoutMilliseconds": 0,
            "leaseMilliseconds": 500,
            "removalDeadlineMilliseconds": 3000,
            "staleReplicaTimeoutMilliseconds": 1800000,
            "detectZeroes": false
          },
          "labels": {
            "app": "db",
            "example.com/tier": ""
          }
        }
        """

    @Test func volumeAsJSON() {
        #expect(Presentation.value(Self.volume()).json() == Self.volumeJSON)
    }

    @Test func whatAVolumeTakes() {
        var volume = Self.volume()
        func line() -> String? {
            let lines = Presentation.details(volume, wide: false).split(separator: "\n")
            return lines.first { $0.hasPrefix("space:") }.map(String.init)
        }
        #expect(line() == "space:       1.5GiB on all replicas, 1GiB not shared")
        volume.exclusiveBytes = 3 << 29
        volume.reclaimableBytes = 3 << 20
        volume.stuckBytes = 4096
        #expect(
            line() == "space:       1.5GiB on all replicas, 3MiB being given back, "
                + "4KiB kept for clones")
        volume.clearAllocatedBytes()
        #expect(line() == nil)
        #expect(
            Presentation.value(volume).json(pretty: false).contains(#""allocatedBytes":null,"#))
    }

    @Test func lostBlocksAreShown() {
        var volume = Self.volume()
        #expect(!Presentation.details(volume, wide: false).contains("condition"))
        volume.conditions = [.lostBlocks]
        let details = Presentation.details(volume, wide: false)
        #expect(details.contains("\ncondition:   lostBlocks: no replica in sync has a good copy"))
        #expect(details.contains("'storagectl volume scrub vol'"))
        #expect(
            Presentation.value(volume).json(pretty: false)
                .contains(#","conditions":["lostBlocks"],"#))
    }

    @Test func whatAVolumeBeganAs() {
        var volume = Self.volume()
        #expect(!Presentation.details(volume, wide: true).contains("origin"))
        #expect(
            Presentation.creation(volume)
                == "volume vol created: 1GiB, replicas on node-1, node-2")
        volume.originVolume = "gold"
        volume.originSnapshot = "v1.0"
        volume.state = .detached
        #expect(
            Presentation.details(volume, wide: false).contains("\norigin:      gold@v1.0\nepoch:"))
        #expect(
            Presentation.value(volume).json(pretty: false)
                .contains(#","originVolume":"gold","originSnapshot":"v1.0","#))
        var temporary = volume.replicas[0]
        temporary.node = "node-3"
        temporary.temporary = true
        volume.replicas.append(temporary)
        #expect(
            Presentation.creation(volume)
                == "volume vol created from gold@v1.0: 1GiB, replicas on node-1, node-2")
        #expect(
            Presentation.table(volume.replicas, wide: false).text
                .contains("node-3  inSync (temporary)"))
        #expect(Presentation.table([volume], wide: false).text.contains("1/2"))
    }

    @Test func howFarAVolumeIsFilled() {
        var volume = Self.volume()
        volume.filling.replicasTotal = 3
        func percent(_ done: UInt32, _ regions: UInt64, of total: UInt64) -> UInt64 {
            volume.filling.replicasDone = done
            volume.filling.regionsDone = regions
            volume.filling.regionsTotal = total
            return Presentation.percent(volume.filling)
        }
        #expect(percent(0, 0, of: 0) == 0 && percent(0, 1, of: 2) == 16)
        #expect(percent(2, 0, of: 0) == 66 && percent(2, 5, of: 5) == 100)
        #expect(percent(3, 0, of: 0) == 100 && percent(4, 0, of: 9) == 100)
        #expect(percent(1, 30, of: 100) == 43)
        #expect(
            Presentation.details(volume, wide: false)
                .contains("\nfilling:     43%, 1 of 3 replicas in sync\n"))
        let json = Presentation.value(volume).json(pretty: false)
        let words = #""filling":{"replicasDone":1,"replicasTotal":3,"regionsDone":30,"#
        #expect(json.contains(words + #""regionsTotal":100,"percent":43}"#))
    }

    @Test func labelsOfVolumes() {
        #expect(
            Presentation.details(Self.volume(), wide: false)
                .contains("\nlabels:      app=db, example.com/tier=\n"))
        let wide = Presentation.table([Self.volume()], wide: true)
        #expect(wide.header.last == "LABELS")
        #expect(wide.rows[0].last == "app=db, example.com/tier=")
    }

    @Test func settingsForPeople() {
        #expect(
            Presentation.line(Self.volume().settings)
                == "min in sync 1, I/O timeout none, lease 500ms, removal deadline 3s, "
                + "stale replica timeout 30m, detect zeroes off")
    }

    private static var rebuild: RebuildRow {
        var rebuild = Haptera_V1_Rebuild()
        rebuild.replicaID = "00000000000000b2"
        rebuild.node = "node-2"
        rebuild.kind = .resync
        rebuild.phase = "copying"
        rebuild.regionsDone = 50
        rebuild.regionsTotal = 200
        rebuild.bytesCopied = 50 << 20
        rebuild.bytesPerSecond = 5 << 20
        rebuild.elapsedMilliseconds = 10_000
        return RebuildRow(volume: "vol", rebuild: rebuild)
    }

    @Test func rebuildsAsTableBarAndJSON() {
        #expect(
            RebuildRow.table([Self.rebuild]).text == """
                VOLUME  REPLICA           NODE    KIND    PHASE    DONE  TOTAL  PERCENT  BYTES  \
                RATE    ELAPSED  ETA
                vol     00000000000000b2  node-2  resync  copying  50    200    25%      50MiB  \
                5MiB/s  10s      30s
                """)
        #expect(
            Self.rebuild.bar(width: 8)
                == "vol 00000000000000b2 resync copying [##......] 25% 50MiB 5MiB/s, 30s left")
        #expect(
            Self.rebuild.value.json(pretty: false)
                == #"{"volume":"vol","replica":"00000000000000b2","node":"node-2","#
                + #""kind":"resync","phase":"copying","regionsDone":50,"regionsTotal":200,"#
                + #""percent":25,"bytesCopied":52428800,"bytesPerSecond":5242880,"#
                + #""elapsedMilliseconds":10000,"etaMilliseconds":30000}"#)
    }

    /// Nothing is divided by what is not known yet.
    @Test func aRebuildThatJustBegan() {
        var rebuild = Haptera_V1_Rebuild()
        rebuild.kind = .resolve
        let row = RebuildRow(volume: "vol", rebuild: rebuild)
        #expect(row.percent == nil)
        #expect(row.etaMilliseconds == nil)
        #expect(row.bar(width: 4) == "vol resolve [....] 0% 0B 0B/s")
    }

    /// Wherever it is shown that a scrub waits, what for is shown, too.
    @Test func whatAScrubWaitsFor() {
        var volume = Self.volume()
        volume.scrub.state = .waiting
        volume.scrub.regionsDone = 5
        volume.scrub.regionsTotal = 1024
        volume.scrub.reason = "replica x on node b is absent"
        #expect(Presentation.scrubDetails(volume).contains("waits:       replica x on node b is"))
        #expect(
            Presentation.details(volume, wide: false).contains(
                "scrub:       waiting, 5 of 1024 MiB: replica x on node b is absent\n"))
    }

    @Test func whatAcceptingALossMeans() {
        var volume = Self.volume()
        volume.replicas[1].inSync = true
        let text = Presentation.lossExplanation(volume)
        #expect(text.contains("00000000000000b1 on node node-1"))
        #expect(text.contains("Not reachable, and perhaps better: 00000000000000b2 on node node-2"))
        #expect(text.contains("Everything that a FLUSH or FUA has answered for is there"))
    }

    @Test func detachedVolumeHasNoEngine() {
        var volume = Self.volume()
        volume.clearEngine()
        volume.state = .detached
        let json = Presentation.value(volume).json(pretty: false)
        #expect(json.contains(#""state":"detached""#))
        #expect(json.contains(#""engine":null"#))
    }

    @Test func attachmentAsJSON() {
        #expect(
            Presentation.attachment(Self.volume()).json() == """
                {
                  "name": "vol",
                  "node": "node-1",
                  "pid": 42,
                  "uri": "nbd://127.0.0.1:20000/vol",
                  "unixURI": "nbd+unix:///vol?socket=/d/e.nbd"
                }
                """)
    }

    @Test func volumesAsTable() {
        #expect(
            Presentation.table([Self.volume()], wide: false).text == """
                NAME  SIZE  STATE     ROBUSTNESS  NODE    REPLICAS
                vol   1GiB  attached  degraded    node-1  1/2
                """)
        var replicas = Self.volume().replicas
        replicas[1].reason = "its directory is gone"
        let lines = Presentation.table(replicas, wide: true).text.split(separator: "\n")
        #expect(lines.count == 3 && lines[0].hasSuffix("ADDRESS          PID  DIRECTORY  REASON"))
        #expect(lines[1].hasPrefix("00000000000000b1  vol     node-1  inSync  yes      127."))
        #expect(lines[1].hasSuffix("127.0.0.1:20001  43   /d/node-1  -"))
        #expect(lines[2].hasSuffix("127.0.0.1:20002  -    /d/node-2  its directory is gone"))
    }

    @Test func eventAsJSONLine() {
        var event = Haptera_V1_Event()
        event.id = 3
        event.timeUnixMilliseconds = 1_700_000_000_123
        event.kind = "VolumeCreated"
        event.subject = "volume/vol"
        event.message = "id 1"
        event.actor = "ann@host"
        #expect(
            Presentation.value(event).json(pretty: false)
                == #"{"id":3,"time":"2023-11-14T22:13:20.123Z","kind":"VolumeCreated","#
                + #""subject":"volume/vol","message":"id 1","actor":"ann@host","peer":null}"#)
    }

    @Test func yamlReadsAsTheSameThing() {
        let value = OutputValue.object([
            ("word", .text("attached")), ("number", .text("0123")), ("truth", .text("true")),
            ("uri", .text("nbd://h:1/v")), ("empty", .text("")), ("nothing", .null),
            ("none", .list([])), ("count", .number(3)), ("true", .object([("a/b", .null)])),
            (
                "list",
                .list([.object([("a", .flag(true)), ("b", .list([.number(1)]))]), .text("x")])
            ),
        ])
        #expect(
            value.yaml == """
                word: attached
                number: "0123"
                truth: "true"
                uri: "nbd://h:1/v"
                empty: ""
                nothing: null
                none: []
                count: 3
                "true":
                  "a/b": null
                list:
                  - a: true
                    b:
                      - 1
                  - x
                """)
    }

    @Test func jsonEscapes() {
        let text = "\"\\\n\r\t\u{1}\u{7f}é"
        #expect(
            OutputValue.text(text).json() == #""\"\\\n\r\t\u0001\u007fé""#)
    }

    @Test func stateWordsAreTheDocumentedOnes() {
        #expect(
            Haptera_V1_VolumeState.allCases.dropFirst().map { Presentation.word($0) } == [
                "creating", "detached", "attaching", "attached", "detaching", "deleting",
            ])
        #expect(
            Haptera_V1_Robustness.allCases.dropFirst().map { Presentation.word($0) } == [
                "healthy", "degraded", "stalled", "faulted",
            ])
        #expect(
            Haptera_V1_ReplicaState.allCases.dropFirst().map { Presentation.word($0) } == [
                "inSync", "joining", "absent", "full", "failed",
            ])
    }

    @Test(arguments: [
        (RPCError.Code.notFound, HapteraCLI.ExitStatus.notFound), (.alreadyExists, .conflict),
        (.failedPrecondition, .conflict), (.invalidArgument, .usage),
        (.unavailable, .unavailable), (.deadlineExceeded, .unavailable), (.internalError, .failed),
    ])
    func errorsHaveTheirExitStatus(_ code: RPCError.Code, _ status: HapteraCLI.ExitStatus) {
        let failure = Session.failure(RPCError(code: code, message: "m"), "h:1")
        #expect(failure.status == status)
        #expect(!failure.message.isEmpty)
    }
}

@Suite struct ContextTests {
    @Test func savedAndFoundAgain() throws {
        let directory = "/tmp/haptera-\(UInt32.random(in: .min ... .max))"
        defer { try? FileManager.default.removeItem(atPath: directory) }
        let environment = ["XDG_CONFIG_HOME": directory]
        let path = Contexts.path(environment)
        #expect(path == directory + "/haptera/contexts.json")
        var contexts = Contexts()
        contexts.contexts["local"] = .init(server: "h:1", directory: "/d")
        contexts.contexts["far"] = .init(server: "h:2")
        contexts.current = "local"
        try contexts.save(path)
        #expect(try Contexts.load(path) == contexts)

        var options = try GlobalOptions.parse([])
        #expect(try Session.resolve(options, environment: environment) == "h:1")
        // Each of these overrides the one before.
        let withServer = environment.merging(["HAPTERA_SERVER": "h:3"]) { $1 }
        #expect(try Session.resolve(options, environment: withServer) == "h:3")
        options.context = "far"
        #expect(try Session.resolve(options, environment: withServer) == "h:2")
        options.server = "h:4"
        #expect(try Session.resolve(options, environment: withServer) == "h:4")
        options.server = nil
        options.context = "unknown"
        let error = #expect(throws: CommandFailure.self) {
            try Session.resolve(options, environment: environment)
        }
        #expect(error?.status == .notFound)
    }

    @Test func withoutAnyTheUserIsToldWhatToDo() throws {
        let options = try GlobalOptions.parse([])
        let error = #expect(throws: CommandFailure.self) {
            try Session.resolve(options, environment: ["XDG_CONFIG_HOME": "/nonexistent"])
        }
        #expect(error?.status == .usage)
        #expect(error?.message.contains("cluster up") == true)
    }

    @Test func aBrokenFileIsNotOverwrittenSilently() throws {
        let path = "/tmp/haptera-\(UInt32.random(in: .min ... .max)).json"
        defer { try? FileManager.default.removeItem(atPath: path) }
        try "{".write(toFile: path, atomically: true, encoding: .utf8)
        #expect(throws: CommandFailure.self) { try Contexts.load(path) }
    }
}
