import Foundation
import HapteraAPI
import HapteraHost
import Testing

@testable import HapteraCLI

/// What changed between snapshots, copies of them, and where to read them.
@Suite struct SnapshotReadTests {
    private func snapshot(_ name: String, layer: UInt32 = 1) -> Haptera_V1_Snapshot {
        var snapshot = Haptera_V1_Snapshot()
        snapshot.name = name
        snapshot.volume = "vol"
        snapshot.layer = layer
        snapshot.uri = "nbd://127.0.0.1:20000/vol@\(name)"
        snapshot.unixUri = "nbd+unix:///vol@\(name)?socket=/nowhere/e.nbd"
        return snapshot
    }

    @Test func placesAreReadFromURIs() {
        #expect(
            NBDPlace(uri: "nbd://127.0.0.1:20000/vol@s")
                == NBDPlace(address: .tcp(host: "127.0.0.1", port: 20000), export: "vol@s"))
        #expect(
            NBDPlace(uri: "nbd://[::1]:9/v")
                == NBDPlace(address: .tcp(host: "::1", port: 9), export: "v"))
        #expect(
            NBDPlace(uri: "nbd+unix:///vol@s?socket=/a/b%20c")
                == NBDPlace(address: .unix("/a/b c"), export: "vol@s"))
        for wrong in ["", "nbd://host/v", "http://h:1/v", "nbd+unix:///v", "nbd+unix:///v?x=/a"] {
            #expect(NBDPlace(uri: wrong) == nil)
        }
    }

    @Test func theSocketIsUsedIfItIsHere() throws {
        let path = "/tmp/haptera-\(UInt32.random(in: .min ... .max))"
        try Data().write(to: URL(filePath: path))
        defer { try? FileManager.default.removeItem(atPath: path) }
        let local = "nbd+unix:///v?socket=\(path)"
        #expect(NBDPlace.reachable(uri: "nbd://h:1/v", unixURI: local)?.address == .unix(path))
        let elsewhere = NBDPlace.reachable(uri: "nbd://h:1/v", unixURI: local + "-x")
        #expect(elsewhere?.address == .tcp(host: "h", port: 1))
        #expect(NBDPlace.reachable(uri: "", unixURI: "") == nil)
    }

    @Test func neighboursAreOneRange() throws {
        for lists in [true, false] {
            var changed = ChangedRanges(lists: lists)
            changed.size = 1 << 20
            for (offset, length) in [(0, 4096), (4096, 8192), (40_960, 4096)] as [(UInt64, UInt64)]
            { try changed.add(offset: offset, length: length) }
            #expect(changed.bytes == 16384 && changed.count == 2)
            let ranges = [
                ChangedRanges.Range(offset: 0, length: 12288),
                ChangedRanges.Range(offset: 40_960, length: 4096),
            ]
            #expect(changed.ranges == (lists ? ranges : []))
        }
        var many = ChangedRanges(lists: true)
        for number in 0..<UInt64(ChangedRanges.listedMax) {
            try many.add(offset: number * 8192, length: 4096)
        }
        let failure = #expect(throws: CommandFailure.self) {
            try many.add(offset: 1 << 50, length: 4096)
        }
        #expect(failure?.message.contains("--summary") == true)
    }

    @Test func whatHasChanged() throws {
        var changed = ChangedRanges(lists: true)
        changed.size = 1 << 20
        #expect(
            Presentation.text(changed, of: "vol", from: "a", to: nil)
                == "0 bytes in 0 ranges of volume vol changed from a to now")
        try changed.add(offset: 8192, length: 4096)
        #expect(
            Presentation.text(changed, of: "vol", from: "a", to: "b") == """
                OFFSET  LENGTH
                8192    4096
                4096 bytes in 1 range of volume vol changed from a to b
                """)
        #expect(
            Presentation.value(changed, of: "vol", from: "a", to: nil).json(pretty: false)
                == #"{"volume":"vol","from":"a","to":null,"sizeBytes":1048576,"#
                + #""changedBytes":4096,"rangeCount":1,"#
                + #""ranges":[{"offset":8192,"length":4096}]}"#)
        let summary = ChangedRanges(lists: false)
        #expect(
            Presentation.value(summary, of: "vol", from: "a", to: "b").json(pretty: false)
                .hasSuffix(#""rangeCount":0,"ranges":null}"#))
    }

    @Test func theEarlierSnapshotComesFirst() throws {
        try Session.checkOrder(snapshot("a", layer: 1), snapshot("b", layer: 2))
        try Session.checkOrder(snapshot("a", layer: 1), snapshot("a", layer: 1))
        let failure = #expect(throws: CommandFailure.self) {
            try Session.checkOrder(snapshot("b", layer: 2), snapshot("a", layer: 1))
        }
        #expect(failure?.status == .usage)
        #expect(failure?.message.hasPrefix("snapshot 'b' was taken after 'a'") == true)
    }

    @Test func howToReadIt() {
        #expect(Presentation.bestURI(snapshot("s")) == "nbd://127.0.0.1:20000/vol@s")
        let text = Presentation.accessText(snapshot("s"))
        #expect(text.hasPrefix("uri:       nbd://127.0.0.1:20000/vol@s\nunix uri:  nbd+unix:///"))
        #expect(
            text.contains(
                "\n    qemu-nbd --snapshot --format=raw --connect=/dev/nbd0 "
                    + "'nbd://127.0.0.1:20000/vol@s'\n"))
        let json = Presentation.access(snapshot("s")).json(pretty: false)
        #expect(json.contains(#""commands":{"copy":"qemu-img convert -f raw -O raw 'nbd:"#))
    }

    // MARK: Copies

    private func copy(_ file: String, force: Bool = false, path: String) throws -> SnapshotCopy {
        try SnapshotCopy(file: file, format: "raw", force: force, environment: ["PATH": path])
    }

    @Test func aMissingToolIsNamedWithItsPackage() {
        for (file, words) in [("x", "'apt install qemu-utils'"), ("-", "'apt install libnbd-bin'")]
        {
            let failure = #expect(throws: CommandFailure.self) {
                try copy(file, path: "/nowhere:.")
            }
            #expect(failure?.message.hasSuffix(words) == true)
        }
    }

    /// Over a stand-in for qemu-img that writes to its last argument, or fails.
    @Test func aCopyIsWholeOrNotThere() throws {
        let directory = "/tmp/haptera-\(UInt32.random(in: .min ... .max))"
        try HostFiles.makeDirectory(directory)
        defer { try? FileManager.default.removeItem(atPath: directory) }
        let tool = directory + "/qemu-img"
        func install(_ script: String) throws {
            try ("#!/bin/sh\n" + script).write(toFile: tool, atomically: true, encoding: .utf8)
            try FileManager.default.setAttributes([.posixPermissions: 0o755], ofItemAtPath: tool)
        }
        let file = directory + "/image"
        func content() -> String? { try? String(contentsOfFile: file, encoding: .utf8) }
        try install("eval \"last=\\${$#}\"; printf \"$6\" > \"$last\"; exit 7")
        #expect(throws: CommandFailure.self) { try copy(file, path: directory).run(from: "one") }
        #expect(content() == nil)
        try install("eval \"last=\\${$#}\"; printf \"$6\" > \"$last\"")
        try copy(file, path: directory).run(from: "one")
        #expect(content() == "one")

        let refusal = #expect(throws: CommandFailure.self) { try copy(file, path: directory) }
        #expect(refusal?.status == .conflict)
        // One that comes while it is copied is not replaced either.
        let early = try copy(file + "2", path: directory)
        try "mine".write(toFile: file + "2", atomically: true, encoding: .utf8)
        #expect(throws: HostError.self) { try early.run(from: "two") }
        #expect(try String(contentsOfFile: file + "2", encoding: .utf8) == "mine")
        try copy(file, force: true, path: directory).run(from: "three")
        #expect(content() == "three")
        #expect(throws: CommandFailure.self) { try copy(directory, force: true, path: directory) }
        // Said before anything is copied, and not in the tool's words.
        for (wrong, words) in [
            ("/nowhere/x", "there is no directory '/nowhere'"),
            (file + "/x", "'\(file)' is no directory"),
        ] {
            let failure = #expect(throws: CommandFailure.self) {
                try copy(wrong, path: directory)
            }
            #expect(failure?.message.contains(words) == true, "\(failure?.message ?? "")")
            #expect(failure?.status == .usage)
        }
        let left = try FileManager.default.contentsOfDirectory(atPath: directory).sorted()
        #expect(left == ["image", "image2", "qemu-img"])
    }

    /// A format that cannot be written in order goes to standard output as a whole, by way of a
    /// file that nobody finds, not even after a kill.
    @Test func aQcow2GoesToStandardOutput() throws {
        let directory = "/tmp/haptera-\(UInt32.random(in: .min ... .max))"
        try HostFiles.makeDirectory(directory)
        defer { try? FileManager.default.removeItem(atPath: directory) }
        func install(_ end: String) throws {
            // It is there for nobody while it is written.
            let script =
                "#!/bin/sh\neval \"last=\\${$#}\"; ls '\(directory)' > '\(directory)/list'; "
                + "printf \"$1 $5 $6\" > \"$last\"; \(end)"
            let tool = directory + "/qemu-img"
            try script.write(toFile: tool, atomically: true, encoding: .utf8)
            try FileManager.default.setAttributes([.posixPermissions: 0o755], ofItemAtPath: tool)
        }
        func export(expecting status: Int32) throws -> String {
            let copy = try SnapshotCopy(
                file: "-", format: "qcow2", force: false,
                environment: ["PATH": directory, "TMPDIR": directory])
            let pipe = Pipe()
            defer { try? pipe.fileHandleForReading.close() }
            let output = pipe.fileHandleForWriting.fileDescriptor
            if status == 0 {
                try copy.run(from: "uri", standardOutput: output)
            } else {
                #expect(throws: CommandFailure.self) {
                    try copy.run(from: "uri", standardOutput: output)
                }
            }
            try pipe.fileHandleForWriting.close()
            return String(
                decoding: try pipe.fileHandleForReading.readToEnd() ?? Data(), as: UTF8.self)
        }
        try install("exit 0")
        #expect(try export(expecting: 0) == "convert qcow2 uri")
        #expect(
            try String(contentsOfFile: directory + "/list", encoding: .utf8) == "list\nqemu-img\n")
        // What is not whole does not come out at all.
        try install("exit 7")
        #expect(try export(expecting: 7) == "")
        let left = try FileManager.default.contentsOfDirectory(atPath: directory).sorted()
        #expect(left == ["list", "qemu-img"])
    }

    private func at(_ place: String, layer: UInt32) -> Haptera_V1_Snapshot {
        var snapshot = Haptera_V1_Snapshot()
        (snapshot.volume, snapshot.name, snapshot.layer) = ("vol", "s", layer)
        snapshot.uri = "nbd://\(place)/vol@s"
        return snapshot
    }

    /// Another place is the same snapshot; another layer is not, whatever its name.
    @Test func aSourceMovesAndStaysWhatItIs() throws {
        let source = SnapshotSource(at("a:1", layer: 3), patience: .seconds(60))
        #expect(source.export == "vol@s")
        source.answered(source.begin(), at("b:2", layer: 3))
        #expect(source.snapshot.uri == "nbd://b:2/vol@s" && source.failure == nil)
        source.failed(HostError("passing"))
        try source.wait(after: HostError("lost"), since: .now)
        source.answered(source.begin(), at("c:3", layer: 4))
        #expect(source.snapshot.uri == "nbd://b:2/vol@s")
        #expect(source.failure?.message.contains("another one has its name now") == true)
        let error = #expect(throws: CommandFailure.self) {
            try source.wait(after: HostError("lost"), since: .now)
        }
        #expect(error?.message == source.failure?.message)
    }

    /// It was Foundation's own error once, with its domain and number.
    @Test func aMissingPlaceForTheSocketIsNamed() {
        let source = SnapshotSource(at("a:1", layer: 3), patience: .zero)
        let error = #expect(throws: CommandFailure.self) {
            try NBDRelay(source, temporary: "/nowhere/")
        }
        #expect(
            error?.message
                == "cannot make a directory in /nowhere/: No such file or directory; set TMPDIR to "
                + "another one")
    }

    @Test func anInterruptionEndsWithItsPatience() {
        let source = SnapshotSource(at("a:1", layer: 3), patience: .zero)
        let error = #expect(throws: CommandFailure.self) {
            try source.wait(after: HostError("nobody answers"), since: .now)
        }
        #expect(error?.message.contains("within 0 s: nobody answers; allow more") == true)
    }
}
