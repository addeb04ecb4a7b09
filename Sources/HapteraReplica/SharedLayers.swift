import Glibc
import HapteraCore
import HapteraIO

/// Layers whose files have names in several copies' directories: see `ReplicaCore+Sharing`. The
/// link count says so, across any crash; only a process that serves one of the copies makes links,
/// so that files which have one name keep it.
extension DirectoryStorage {
    /// Until `claim` says otherwise: who had it last may still have writes on their way.
    package func isShared(_ layer: LayerID) -> Bool {
        [ReplicaFile.data(layer), .table(layer)].contains { file in
            guard let fd = try? descriptor(file) else { return false }
            return sharedFiles.contains(file) || linkCount(fd) > 1
        }
    }
    func linkCount(_ fd: Int32) -> UInt64 {
        var status = stat()
        // SAFETY: `status` is a local that outlives the call.
        return unsafe fstat(fd, &status) == 0 ? UInt64(status.st_nlink) : 1
    }

    /// Gives the layers' files names in `target`/layers as well, durable when that directory is
    /// synced. All of them or none. Files that have theirs already are fine. `target` has to be
    /// there: a request that comes late must not make a directory nobody knows of.
    func share(_ layers: [LayerID], into target: String) throws(StorageError) {
        let path = "\(target)/layers"
        // SAFETY: the string outlives the call.
        guard unsafe mkdir(path, 0o700) == 0 || errno == EEXIST else {
            throw Self.error(errno, "cannot create \(path): \(errorText(errno))")
        }
        var made: [String] = []
        do throws(StorageError) {
            for layer in layers {
                for file in [ReplicaFile.data(layer), .table(layer)] {
                    if try link(file, into: target) { made.append(name(file, in: target)) }
                }
            }
        } catch {
            // SAFETY: the string outlives the call.
            for path in made { _ = unsafe unlink(path) }
            throw error
        }
        for layer in layers {
            for file in [ReplicaFile.data(layer), .table(layer)] {
                sharedFiles.insert(file)
                // From an exclusive lock this never waits.
                flock(try descriptor(file), LOCK_SH | LOCK_NB)
            }
        }
    }
    private func name(_ file: ReplicaFile, in target: String) -> String {
        target + path(file).dropFirst(directory.utf8.count)
    }
    /// False: it was linked before.
    private func link(_ file: ReplicaFile, into target: String) throws(StorageError) -> Bool {
        let name = name(file, in: target)
        // SAFETY: the strings outlive the call.
        if unsafe Glibc.link(path(file), name) == 0 { return true }
        let number = errno
        var (own, other) = (stat(), stat())
        // SAFETY: as above; the structures are locals.
        if number == EEXIST, unsafe stat(path(file), &own) == 0, unsafe stat(name, &other) == 0,
            own.st_ino == other.st_ino, own.st_dev == other.st_dev
        {
            return false
        }
        let reason =
            switch number {
            case EXDEV: "it is on another file system"
            case EMLINK: "the file has as many names as its file system allows"
            default: errorText(number)
            }
        throw Self.error(number, "cannot link \(path(file)) to \(name): \(reason)")
    }

    /// True: nobody else has the layer's files any more, and the lock is this process's alone.
    func claim(_ layer: LayerID) -> Bool {
        let files = [ReplicaFile.data(layer), .table(layer)]
        let isOwn = files.allSatisfy { file in
            guard let fd = try? descriptor(file), linkCount(fd) < 2 else { return false }
            if flock(fd, LOCK_EX | LOCK_NB) == 0 { return true }
            // The kernel gives the old lock up first.
            flock(fd, LOCK_SH | LOCK_NB)
            return false
        }
        if isOwn { sharedFiles.subtract(files) }
        return isOwn
    }
}

/// The control verb `share`, and what comes of it.
final class LayerSharing {
    /// A clone's copy is about to be made from this one.
    private struct Pending {
        var request: ControlRequest
        var layers: [LayerID]
        var target: String
        var deadline: Instant
    }
    /// Regions drain when a flush that covers them is known to all members.
    private static let waitMilliseconds: UInt64 = 3000

    private let core: ReplicaCore
    private let storage: DirectoryStorage
    private var pending: [Pending] = []
    private var checkAt = Instant.zero
    private var claimAt = Instant.zero

    init(core: ReplicaCore, storage: DirectoryStorage) {
        self.core = core
        self.storage = storage
    }

    /// The directory is one beside this copy's, by its name: requests are words, which paths may
    /// not be.
    private func parse(
        _ arguments: [String: String]
    ) throws(IOError) -> (layer: LayerID, target: String, epoch: Epoch) {
        guard let layer = arguments["layer"].flatMap({ UInt32($0) }),
            let name = arguments["into"], !name.isEmpty, !name.contains("/"), name != ".",
            name != "..",
            let epoch = arguments["epoch"].flatMap({ UInt64($0) }), arguments.count == 3
        else { throw IOError("share needs layer=N into=NAME epoch=N") }
        return (LayerID(rawValue: layer), "\(storage.directory)/../\(name)", Epoch(epoch))
    }

    /// The next step of the core begins what it waits for.
    func begin(_ request: ControlRequest, now: Instant) {
        do throws(IOError) {
            let (layer, target, epoch) = try parse(request.arguments)
            let layers: [LayerID]
            do throws(SharingRefusal) {
                layers = try core.beginSharing(layer, epoch: epoch)
            } catch { throw IOError(error.text) }
            pending.append(
                Pending(
                    request: request, layers: layers, target: target,
                    deadline: now.adding(milliseconds: Self.waitMilliseconds)))
        } catch {
            request.fail("\(error)")
        }
    }

    /// After every turn.
    func advance(now: Instant, isStopping: Bool) {
        guard !pending.isEmpty, now >= checkAt || isStopping else { return }
        checkAt = now.adding(milliseconds: 5)
        pending.removeAll { share in
            let ready = core.layersToLink(share.layers)
            guard ready != nil || isStopping || now >= share.deadline else { return false }
            var linked: [LayerID] = []
            if let ready {
                linked = link(ready, share)
            } else {
                share.request.fail(
                    "\(SharingRefusal.notYetText): what was written before the snapshot is not "
                        + "known to be flushed on all replicas; attach the volume if no engine "
                        + "serves it")
            }
            // What is not linked is found to be this copy's own by `claim`.
            core.endSharing(share.layers, linked: linked)
            return true
        }
    }
    private func link(_ layers: [LayerID], _ share: Pending) -> [LayerID] {
        do throws(StorageError) {
            try storage.share(layers, into: share.target)
            Log.info("layers shared", ("layers", String(layers.count)), ("with", share.target))
            share.request.reply([
                ("layers", layers.map { String($0.rawValue) }.joined(separator: ",")),
                ("size", String(core.identity.size)), ("logIndex", String(core.logNextIndex)),
            ])
            return layers
        } catch {
            share.request.fail(error.message)
            return []
        }
    }

    /// Clones come and go without a word: once a second their layers are looked at.
    func claim(now: Instant) {
        guard now >= claimAt else { return }
        claimAt = now.adding(milliseconds: 1000)
        for layer in core.sharedLayers where !core.isSharing(layer) && storage.claim(layer) {
            Log.info("layer is not shared any more", ("layer", String(layer.rawValue)))
            core.setShared(layer, false)
        }
    }

    /// What shared layers take.
    func bytes(_ allocated: [ReplicaFile: UInt64]) -> UInt64 {
        core.sharedLayers.reduce(0) {
            $0 + (allocated[.data($1)] ?? 0) + (allocated[.table($1)] ?? 0)
        }
    }
}

extension SharingRefusal {
    var text: String {
        switch self {
        case .noSuchLayer: "this replica has no snapshot's layer of that number"
        case .notInSync: "\(Self.notYetText): this replica is not in sync"
        case .tooManyLayers:
            "this replica has too many layers of deleted snapshots that clones still share; delete "
                + "some of these clones"
        case .epochTooLow:
            "the volume's epoch has passed the one the clone would begin at; create it again"
        }
    }
}
