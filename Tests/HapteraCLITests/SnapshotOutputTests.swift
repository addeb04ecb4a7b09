import Foundation
import GRPCCore
import HapteraAPI
import HapteraCore
import HapteraHost
import Testing

@testable import HapteraCLI

/// As `OutputTests`: these texts change only with their documentation.
@Suite struct SnapshotOutputTests {
    /// Seconds since 1970 at 2026-11-28T17:30:05Z.
    private static let time: Int64 = 1_795_887_005
    private static let now = Date(timeIntervalSince1970: Double(time + 3725))

    private static func snapshot(
        _ name: String, layer: UInt32 = 1, age: Int64 = 3725, readable: Bool = true,
        parent: String = "", isLast: Bool = true
    ) -> Haptera_V1_Snapshot {
        var snapshot = Haptera_V1_Snapshot()
        snapshot.name = name
        snapshot.ownBytes = UInt64(layer) << 20
        snapshot.exclusiveBytes = UInt64(layer) << 12
        snapshot.cumulativeBytes = 5 << 29
        snapshot.parent = parent
        snapshot.isVolumeParent = isLast
        snapshot.volume = "vol"
        snapshot.layer = layer
        snapshot.sizeBytes = 3 << 29
        snapshot.createdUnixMilliseconds = (time + 3725 - age) * 1000 + 7
        if readable {
            snapshot.uri = "nbd://127.0.0.1:20000/vol@\(name)"
            snapshot.unixUri = "nbd+unix:///vol@\(name)?socket=/d/e.nbd"
        }
        return snapshot
    }

    @Test func asJSON() {
        #expect(
            Presentation.value(Self.snapshot("s")).json() == """
                {
                  "name": "s",
                  "volume": "vol",
                  "created": "2026-11-28T17:30:05.007Z",
                  "layer": 1,
                  "sizeBytes": 1610612736,
                  "ownBytes": 1048576,
                  "exclusiveBytes": 4096,
                  "cumulativeBytes": 2684354560,
                  "parent": null,
                  "isVolumeParent": true,
                  "uri": "nbd://127.0.0.1:20000/vol@s",
                  "unixURI": "nbd+unix:///vol@s?socket=/d/e.nbd",
                  "labels": {}
                }
                """)
        #expect(
            Presentation.value(Self.snapshot("s", readable: false)).json(pretty: false)
                .hasSuffix(#""uri":null,"unixURI":null,"labels":{}}"#))
        var labelled = Self.snapshot("s")
        labelled.labels = ["b": "2", "a": "", "haptera.io/schedule": "hourly"]
        #expect(
            Presentation.value(labelled).json(pretty: false)
                .hasSuffix(#""labels":{"a":"","b":"2","haptera.io/schedule":"hourly"}}"#))
        #expect(
            Presentation.details(labelled, now: Self.now)
                .contains("\nlabels:      a=, b=2, haptera.io/schedule=hourly\n"))
    }

    @Test func asTable() {
        let snapshots = [
            Self.snapshot("daily", age: 90_060, isLast: false),
            Self.snapshot("s", layer: 12, parent: "daily", isLast: false),
            // The other host's clock is ahead.
            Self.snapshot("new", layer: 13, age: -5, parent: "s"),
        ]
        #expect(
            Presentation.table(snapshots, now: Self.now, wide: false).text == """
                NAME   CREATED               AGE    LAYER  SIZE    OWN    EXCLUSIVE  CUMULATIVE
                daily  2026-11-27T17:31:10Z  1d 1h  1      1.5GiB  1MiB   4KiB       2.5GiB
                s      2026-11-28T17:30:05Z  1h 2m  12     1.5GiB  12MiB  48KiB      2.5GiB
                new    2026-11-28T18:32:15Z  0s     13     1.5GiB  13MiB  52KiB      2.5GiB
                """)
        #expect(
            Presentation.table([Self.snapshot("s", layer: 12)], now: Self.now, wide: true)
                == TextTable(
                    [
                        "NAME", "CREATED", "AGE", "LAYER", "SIZE", "OWN", "EXCLUSIVE",
                        "CUMULATIVE", "URI", "LABELS",
                    ],
                    [
                        [
                            "s", "2026-11-28T17:30:05Z", "1h 2m", "12", "1.5GiB", "12MiB",
                            "48KiB", "2.5GiB",
                            "nbd://127.0.0.1:20000/vol@s", "",
                        ]
                    ]))
    }

    @Test func whatNobodyHasSaidIsLeftOpen() {
        var snapshot = Self.snapshot("s")
        snapshot.clearOwnBytes()
        snapshot.clearExclusiveBytes()
        snapshot.clearCumulativeBytes()
        #expect(Presentation.value(snapshot).json(pretty: false).contains(#""ownBytes":null"#))
        #expect(!Presentation.details(snapshot, now: Self.now).contains("own:"))
        #expect(
            Presentation.table([snapshot], now: Self.now, wide: false).text.hasSuffix(
                "1.5GiB  -    -          -"))
        #expect(
            Presentation.value(snapshot).json(pretty: false).contains(#""exclusiveBytes":null"#))
        #expect(!Presentation.details(snapshot, now: Self.now).contains("exclusive:"))
    }

    @Test func aRevertMakesATree() {
        let snapshots = [
            Self.snapshot("a"), Self.snapshot("b", layer: 2, parent: "a", isLast: false),
            Self.snapshot("kept", layer: 3, parent: "b", isLast: false),
        ]
        let time = ["2026-11-28T17:30:05Z", "1h 2m"]
        #expect(
            Presentation.table(snapshots, now: Self.now, wide: false)
                == TextTable(
                    [
                        "NAME", "CREATED", "AGE", "LAYER", "SIZE", "OWN", "EXCLUSIVE",
                        "CUMULATIVE", "PARENT",
                    ],
                    [
                        ["a"] + time + ["1", "1.5GiB", "1MiB", "4KiB", "2.5GiB", "-"],
                        ["├─ b"] + time + ["2", "1.5GiB", "2MiB", "8KiB", "2.5GiB", "a"],
                        ["│  kept"] + time + ["3", "1.5GiB", "3MiB", "12KiB", "2.5GiB", "b"],
                        ["(volume)", "-", "-", "-", "-", "-", "-", "-", "a"],
                    ]))
        #expect(
            Presentation.details(snapshots[2], now: Self.now).contains("parent:      b\n"))
        #expect(
            Presentation.reverted("vol", to: "a", keeping: "kept")
                == "volume vol is back at snapshot a; what it held is snapshot kept")
    }

    private static func names(_ links: [(String, String)], volume: String) -> [String] {
        let snapshots = links.enumerated().map { index, link in
            snapshot(
                link.0, layer: UInt32(index + 1), parent: link.1, isLast: link.0 == volume)
        }
        return Presentation.table(snapshots, now: now, wide: false).rows.map { $0[0] }
    }

    /// What the volume came from stays in one column, however long; what reverts left branches off.
    @Test func branchesAreIndented() {
        #expect(
            Self.names(
                [("a", ""), ("b", "a"), ("c", "a"), ("k1", "b"), ("d", "c"), ("k2", "d")],
                volume: "b")
                == ["a", "├─ c", "│  d", "│  k2", "b", "├─ k1", "(volume)"])
        // A branch has branches.
        #expect(
            Self.names(
                [("a", ""), ("b", "a"), ("k1", "b"), ("k2", "b"), ("k3", "k1")], volume: "a")
                == ["a", "├─ b", "│  ├─ k1", "│  │  k3", "│  k2", "(volume)"])
        // What they all came from has been deleted.
        #expect(
            Self.names([("b", ""), ("k", "b"), ("c", "")], volume: "c")
                == ["├─ b", "│  k", "c"] + ["(volume)"])
        #expect(Self.names([("k", "")], volume: "") == ["├─ k", "(volume)"])
        // Not all of them are shown, of which one knows only what the last column says.
        #expect(Self.names([("a", ""), ("c", "b")], volume: "c") == ["a", "c", "(volume)"])
        let chain = (0..<1000).map { ("s\($0)", $0 == 0 ? "" : "s\($0 - 1)") }
        #expect(Self.names(chain, volume: "s999") == chain.map(\.0))
        #expect(Self.names(chain + [("k", "s5")], volume: "s999")[5...7] == ["s5", "├─ k", "s6"])
    }

    @Test func detailsSayWhereToRead() {
        #expect(
            Presentation.details(Self.snapshot("s"), now: Self.now) == """
                name:        s
                volume:      vol
                created:     2026-11-28T17:30:05Z (1h 2m ago)
                layer:       1
                size:        1.5GiB (1610612736 bytes)
                own:         1MiB, 2.5GiB with those below
                exclusive:   4KiB, which deleting it gives back
                uri:         nbd://127.0.0.1:20000/vol@s
                unix uri:    nbd+unix:///vol@s?socket=/d/e.nbd
                """)
        #expect(
            Presentation.details(Self.snapshot("s", readable: false), now: Self.now)
                .hasSuffix("attach the volume to read it: storagectl volume attach vol"))
    }

    @Test func whatCreateSays() {
        #expect(
            Presentation.taken(Self.snapshot("s"))
                == "snapshot s of volume vol is taken: 2026-11-28T17:30:05Z, layer 1")
        // One of that name was deleted meanwhile, and is another.
        #expect(
            Presentation.taken(Self.snapshot("s"), before: Self.snapshot("s", layer: 2))
                .contains("is taken"))
        #expect(
            Presentation.taken(Self.snapshot("s"), before: Self.snapshot("s"))
                == "snapshot s of volume vol was there already, taken 2026-11-28T17:30:05Z, layer 1"
        )
    }

    @Test func whatDeleteSays() {
        #expect(Presentation.deleted("s", of: "vol") == "snapshot s of volume vol deleted")
        #expect(
            Presentation.deletion("s", of: "vol").json() == """
                {
                  "name": "s",
                  "volume": "vol",
                  "deleted": true
                }
                """)
    }

    @Test func volumesSayHowManyTheyHave() {
        var volume = Haptera_V1_Volume()
        volume.name = "vol"
        #expect(!Presentation.details(volume, wide: false).contains("snapshots:"))
        volume.snapshotCount = 3
        #expect(Presentation.details(volume, wide: false).contains("\nsnapshots:   3\n"))
        #expect(Presentation.value(volume).json(pretty: false).contains(#""snapshotCount":3"#))
    }

    @Test func generatedNames() {
        let time = Date(timeIntervalSince1970: Double(Self.time))
        for (random, end) in [(UInt16(0xab12), "ab12"), (7, "0007")] {
            let name = SnapshotArgument(generatedAt: time, random: random).text
            #expect(name == "snap-20261128-173005-\(end)")
            #expect(VolumeRecord.isValidSnapshotName(name))
        }
    }

    @Test func doubtSaysHowToFindOut() {
        let ours = Session.snapshotDoubt(
            RPCError(code: .deadlineExceeded, message: "timed out"), "s", "vol")
        #expect(ours.status == .unavailable)
        #expect(
            ours.message
                == "it is not known whether snapshot 's' of volume 'vol' was taken: no answer came "
                + "in time; find out with 'storagectl snapshot list vol'; 'storagectl snapshot "
                + "create vol s' takes it unless it is there, and returns when it is safe")
        let theirs = Session.snapshotDoubt(
            RPCError(code: .deadlineExceeded, message: "it is not known whether: why"), "s", "vol")
        #expect(theirs.message.hasPrefix("it is not known whether: why; find out with"))
    }

    @Test func doubtAboutADeletionSaysHowToFindOut() {
        let ours = Session.deletionDoubt(
            RPCError(code: .deadlineExceeded, message: "timed out"), "s", "vol")
        #expect(ours.status == .unavailable)
        #expect(
            ours.message
                == "it is not known whether snapshot 's' of volume 'vol' was deleted: no answer "
                + "came in time; find out with 'storagectl snapshot list vol'; deleting it again "
                + "is harmless")
        let theirs = Session.deletionDoubt(
            RPCError(code: .deadlineExceeded, message: "it is not known whether: why"), "s", "vol")
        #expect(
            theirs.message
                == "it is not known whether: why; find out with 'storagectl snapshot list vol'; "
                + "deleting it again is harmless")
    }

    /// A controller that restarts may answer the request that is sent again only.
    @Test func aSnapshotThatIsGoneAtTheSecondRequest() {
        let failure = Session.goneMeanwhile(
            RPCError(code: .notFound, message: "volume 'vol' has no snapshot 's'"))
        #expect(failure.status == .notFound)
        #expect(
            failure.message
                == "volume 'vol' has no snapshot 's'; this command asked more than once, and may "
                + "have deleted it before")
    }
}
