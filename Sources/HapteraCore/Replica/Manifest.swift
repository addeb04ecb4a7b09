/// Which boot of the host this is: 128 bits that differ after every restart.
package struct BootID: Hashable, BitwiseCopyable, Sendable {
    package var high: UInt64
    package var low: UInt64
    package init(high: UInt64, low: UInt64) {
        self.high = high
        self.low = low
    }
    package static let none = BootID(high: 0, low: 0)
}

/// Whose copy of what a directory is. Never changes.
package struct ReplicaIdentity: Equatable, Sendable {
    package var volume: VolumeID
    package var name: String
    package var replica: ReplicaID
    package var incarnation: Incarnation
    /// Bytes, whole blocks: of the volume when the copy was made. Now: `Manifest.size`.
    package var size: UInt64
    package init(
        volume: VolumeID, name: String, replica: ReplicaID, incarnation: Incarnation, size: UInt64
    ) {
        self.volume = volume
        self.name = name
        self.replica = replica
        self.incarnation = incarnation
        self.size = size
    }
    package var member: VolumeRecord.Member {
        VolumeRecord.Member(replica: replica, incarnation: incarnation)
    }
    /// The same copy, whose volume may have grown since it was made: its record will tell it.
    package func isEarlier(of now: ReplicaIdentity) -> Bool {
        var before = now
        before.size = size
        return self == before && size <= now.size
    }
}

/// The durable heart of a replica: identity, promise, layer chain. Two slots of 256 KiB; the valid
/// one with the higher counter counts. A write goes to slot counter % 2, and when that is durable
/// to the other: at rest both hold the same, and rot in one takes nothing back.
///
/// A file of less than 512 KiB, 128 at least, is of before records grew: its slots have 64 KiB.
/// Opening the copy lets it grow (`ReplicaCore.widenManifest`).
///
///     offset  size  slot
///          0     4  magic      "HPMF"
///          4     4  format     2, or 3 if a layer has another name than its number
///          8     8  counter    grows by one per change
///         16     4  length     bytes of the body
///         20     4  checksum   CRC32C of bytes 0..<20, then of the body
///         24        body       in this order, integers little-endian, texts and lists with a
///                              4-byte count: volume (16), name, replica (8), incarnation (8),
///                              size (8), promise (8), engine it was promised to (8), settled boot
///                              (16), boot (16), clean (1), layers, in format 3 names that differ
///                              (number, name), installed record (bytes, as a list)
package struct Manifest: Equatable, Sendable {
    package static let slotSize = 256 << 10
    package static let fileSize = UInt64(2 * slotSize)
    package static let slotSizeBefore = 64 << 10
    package static let fileSizeBefore = UInt64(2 * slotSizeBefore)
    package static let magic: UInt32 = 0x464d_5048
    package static let formatVersion: UInt32 = 2
    package static let formatVersionNamed: UInt32 = 3
    private static let bodyOffset = 24
    /// Two open files each. Beside the largest record, and if each has a name of its own, four
    /// times as many would fit. An Install that would add more is refused.
    package static let layersMax = 2600
    /// How many fit beside this record, with room for it to grow while no layer may be added.
    package static func layersMost(beside record: VolumeRecord) -> Int {
        max(layersMax, (slotSize - 8192 - record.encoded().count) / 12)
    }

    package var counter: UInt64 = 0
    package var identity: ReplicaIdentity
    package var promise: Epoch = .zero
    package var promisedEngine: InstanceID = .none
    /// The boot during which this copy was last known to be equal to the others.
    package var settledBoot: BootID = .none
    /// The boot during which it last promised anything: nothing was written since in any other.
    package var boot: BootID = .none
    /// Everything was synced and nothing has been written since.
    package var isClean = true
    /// Their numbers, ascending.
    package var layers: [LayerID] = [LayerID(rawValue: 1)]
    /// Of layers that the record knows by another one.
    package var names: [LayerID: LayerID] = [:]
    package var installed: VolumeRecord?

    package init(identity: ReplicaIdentity) { self.identity = identity }

    package var head: LayerID { layers[layers.count - 1] }
    /// Bytes of the volume, by the record installed.
    package var size: UInt64 { installed?.size ?? identity.size }
    package func name(of layer: LayerID) -> LayerID { names[layer] ?? layer }
    /// Bytes that a layer's data file has at least: more if the volume was about to grow. Of one
    /// that is retired the record does not know it any more (seed 361), only that it is no older
    /// than the copy.
    package func size(of layer: LayerID) -> UInt64 {
        let name = name(of: layer)
        guard let installed, installed.layers.index(ofLayer: name) != nil else {
            return identity.size
        }
        return installed.size(of: name)
    }
    /// Of deleted snapshots, and not merged yet.
    package var retiredLayers: [LayerID] {
        guard let installed else { return [] }
        return layers.filter { installed.layers.index(ofLayer: name(of: $0)) == nil }
    }
    package static func slotSize(ofFile size: UInt64) -> Int {
        size < fileSize ? slotSizeBefore : slotSize
    }
    package func slotOffset(_ slotSize: Int = slotSize) -> UInt64 { UInt64(slot * slotSize) }
    /// Where it is written first; then the other slot gets the same.
    package var slot: Int { Int(counter % 2) }
    /// What it may grow to without another Install: each layer may get a name of its own.
    package func fits(_ slotSize: Int) -> Bool {
        let fixed = Self.bodyOffset + 164 + identity.name.utf8.count
        return fixed + 12 * layers.count + (installed?.encoded().count ?? 0) <= slotSize
    }

    /// Bytes to write at `slotOffset`, padded to whole 4 KiB.
    package func encoded() -> [UInt8] {
        var body = ByteWriter()
        body.append(identity.volume.high)
        body.append(identity.volume.low)
        body.append(text: identity.name)
        body.append(identity.replica.rawValue)
        body.append(identity.incarnation.rawValue)
        body.append(identity.size)
        body.append(promise.rawValue)
        body.append(promisedEngine.rawValue)
        body.append(settledBoot.high)
        body.append(settledBoot.low)
        body.append(boot.high)
        body.append(boot.low)
        body.append(isClean ? 1 as UInt8 : 0)
        body.append(UInt32(layers.count))
        for layer in layers { body.append(layer.rawValue) }
        if !names.isEmpty {
            body.append(UInt32(names.count))
            for (layer, name) in names.sorted(by: { $0.key < $1.key }) {
                body.append(layer.rawValue)
                body.append(name.rawValue)
            }
        }
        let record = installed?.encoded() ?? []
        body.append(UInt32(record.count))
        body.append(raw: record)

        var slot = ByteWriter()
        slot.append(Self.magic)
        slot.append(names.isEmpty ? Self.formatVersion : Self.formatVersionNamed)
        slot.append(counter)
        slot.append(UInt32(body.bytes.count))
        slot.append(checksum(of: slot.bytes + body.bytes))
        slot.append(raw: body.bytes)
        let padded = (slot.bytes.count + 4095) & ~4095
        precondition(padded <= Self.slotSize)
        return slot.bytes + [UInt8](repeating: 0, count: padded - slot.bytes.count)
    }

    /// Nil unless `memory` (one slot) holds a whole valid manifest.
    package init?(decoding memory: RawMemory) {
        guard memory.count >= Self.bodyOffset, memory.load(UInt32.self, 0) == Self.magic,
            Self.formatVersion...Self.formatVersionNamed ~= memory.load(UInt32.self, 4)
        else { return nil }
        let length = Int(memory.load(UInt32.self, 16))
        guard length <= min(memory.count, Self.slotSize) - Self.bodyOffset else { return nil }
        let body = memory.slice(Self.bodyOffset, length)
        let expected = CRC32C.checksum(
            body, continuing: CRC32C.checksum(memory.slice(0, 20)))
        guard memory.load(UInt32.self, 20) == expected else { return nil }
        self.init(
            body: body.bytes(),
            isNamed: memory.load(UInt32.self, 4) == Self.formatVersionNamed)
        counter = memory.load(UInt64.self, 8)
        guard counter < 1 << 62 else { return nil }
    }

    private init?(body: [UInt8], isNamed: Bool) {
        var r = ByteReader(body)
        let volume = VolumeID(high: r.read(UInt64.self), low: r.read(UInt64.self))
        let name = r.readText(limit: VolumeRecord.nameLengthMax)
        identity = ReplicaIdentity(
            volume: volume, name: name, replica: ReplicaID(rawValue: r.read(UInt64.self)),
            incarnation: Incarnation(rawValue: r.read(UInt64.self)), size: r.read(UInt64.self))
        promise = Epoch(r.read(UInt64.self))
        promisedEngine = InstanceID(rawValue: r.read(UInt64.self))
        settledBoot = BootID(high: r.read(UInt64.self), low: r.read(UInt64.self))
        boot = BootID(high: r.read(UInt64.self), low: r.read(UInt64.self))
        let clean = r.read(UInt8.self)
        isClean = clean == 1
        // Earlier versions knew no limit but the slot's.
        let limit = Self.slotSizeBefore / 4
        layers = (0..<r.readCount(limit: limit)).map { _ in LayerID(rawValue: r.read(UInt32.self)) }
        if isNamed {
            for _ in 0..<r.readCount(limit: limit) {
                let layer = LayerID(rawValue: r.read(UInt32.self))
                names[layer] = LayerID(rawValue: r.read(UInt32.self))
            }
            // A layer is named after itself or after one that it has taken in.
            let all = layers.map(name(of:))
            guard Set(names.keys).isSubset(of: layers), !names.isEmpty,
                zip(layers, all).allSatisfy({ $0 <= $1 }), all.last == layers.last,
                zip(all, all.dropFirst()).allSatisfy({ $0 < $1 })
            else { return nil }
        }
        let record = r.read(raw: r.readCount(limit: VolumeRecord.encodedSizeMax))
        if !record.isEmpty {
            guard let decoded = VolumeRecord(decoding: record) else { return nil }
            installed = decoded
        }
        guard r.isValid, r.remaining == 0, clean <= 1, !layers.isEmpty, identity.isValid,
            promise.rawValue < 1 << 62
        else { return nil }
    }

    package enum Loaded {
        /// Neither slot was ever written: making the directory was cut short.
        case neverWritten
        case manifest(Manifest)
        case damaged
    }

    /// Chooses between the two slots, `memory` being the whole file or as much of it as there is.
    package static func load(_ memory: RawMemory) -> Loaded {
        var newest: Manifest?
        let slotSize = slotSize(ofFile: UInt64(memory.count))
        for slot in 0..<2 where memory.count >= (slot + 1) * slotSize {
            let bytes = memory.slice(slot * slotSize, slotSize)
            guard let found = Manifest(decoding: bytes) else { continue }
            if found.counter >= newest?.counter ?? 0 { newest = found }
        }
        if let newest { return .manifest(newest) }
        return memory.isZero ? .neverWritten : .damaged
    }
}

extension ReplicaIdentity {
    /// Sane, whether it came from a disk or from a command line.
    package var isValid: Bool {
        replica.rawValue != 0 && incarnation.rawValue != 0 && VolumeRecord.isValidSize(size)
            && !name.isEmpty && name.utf8.count <= VolumeRecord.nameLengthMax
    }
}
