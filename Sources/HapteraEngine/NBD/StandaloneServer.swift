import Glibc
import HapteraCore
import HapteraIO

/// What `haptera-engine --memory` or `--file` was asked for: the NBD server alone, without
/// replication.
package struct StandaloneOptions: Equatable {
    package enum Content: Equatable {
        case memory(size: UInt64)
        case file(path: String)
    }
    package var content: Content
    package var exportName = "haptera"
    package var addresses: [SocketAddress] = []
    package var isReadOnly = false

    package static let usage = """
        usage: haptera-engine --memory SIZE | --file PATH  [--export NAME] [--read-only]
                   --nbd HOST:PORT and/or --nbd-unix PATH

          --memory SIZE   serve SIZE bytes of memory (suffixes KiB, MiB, GiB, TiB)
          --file PATH     serve one file with O_DIRECT
          --export NAME   the export's name (haptera); the empty name reaches it too
        """

    /// `arguments`: without the program's name. Throws a message for the user.
    package init(_ arguments: [String]) throws(UsageError) {
        var content: Content?
        var rest = arguments[...]
        func value(_ option: String) throws(UsageError) -> String {
            guard let value = rest.popFirst() else {
                throw UsageError("\(option) needs a value")
            }
            return value
        }
        while let option = rest.popFirst() {
            switch option {
            case "--memory":
                let text = try value(option)
                guard content == nil else { throw UsageError("one of --memory, --file") }
                guard let size = Self.size(text), size > 0, size <= MemoryDevice.sizeMax,
                    size % UInt64(Geometry.blockSize) == 0
                else {
                    throw UsageError(
                        "--memory: '\(text)' is not a multiple of 4KiB up to 1TiB")
                }
                content = .memory(size: size)
            case "--file":
                guard content == nil else { throw UsageError("one of --memory, --file") }
                content = .file(path: try value(option))
            case "--export":
                exportName = try value(option)
                guard exportName.utf8.count <= NBDLimits.stringLengthMax else {
                    throw UsageError("--export: at most 4096 bytes")
                }
            case "--nbd":
                let text = try value(option)
                guard let address = SocketAddress(tcp: text) else {
                    throw UsageError("--nbd: '\(text)' is not HOST:PORT")
                }
                addresses.append(address)
            case "--nbd-unix": addresses.append(.unix(path: try value(option)))
            case "--read-only": isReadOnly = true
            default: throw UsageError("unknown option '\(option)'")
            }
        }
        guard let content else { throw UsageError("--memory or --file is needed") }
        guard !addresses.isEmpty else { throw UsageError("--nbd or --nbd-unix is needed") }
        self.content = content
    }

    /// "4096", "64MiB"; nil if it is no size or does not fit 64 bits.
    static func size(_ text: String) -> UInt64? {
        let digits = text.prefix { $0.isASCII && $0.isNumber }
        guard let number = UInt64(digits) else { return nil }
        let shift: UInt64
        switch text.dropFirst(digits.count) {
        case "": shift = 0
        case "KiB": shift = 10
        case "MiB": shift = 20
        case "GiB": shift = 30
        case "TiB": shift = 40
        default: return nil
        }
        let (bytes, overflow) = number.multipliedReportingOverflow(by: 1 << shift)
        return overflow ? nil : bytes
    }
}

/// Runs the server alone until SIGTERM or SIGINT.
package enum StandaloneServer {
    package static func run(_ options: StandaloneOptions) throws(IOError) {
        let reactor = try Reactor(backend: Backend.fromEnvironment())
        let device: any BlockDevice
        switch options.content {
        case .memory(let size):
            device = MemoryDevice(
                name: options.exportName, size: size, isReadOnly: options.isReadOnly,
                pool: reactor.pool)
        case .file(let path):
            device = try FileDevice(
                path: path, name: options.exportName, isReadOnly: options.isReadOnly,
                reactor: reactor)
        }
        let server = NBDServer(reactor: reactor, device: device)
        _ = try SignalWatcher(reactor: reactor, signals: [SIGTERM, SIGINT]) { [reactor] _ in
            server.stop { reactor.stop() }
        }
        for address in options.addresses {
            let bound = try Listener.whileTaken { () throws(IOError) in
                try server.listen(on: address)
            }
            Log.info("serving", ("export", options.exportName), ("address", bound.text))
        }
        reactor.run()
    }
}
