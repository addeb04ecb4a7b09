import ArgumentParser
import Foundation
import GRPCCore
import GRPCNIOTransportHTTP2Posix
import Glibc
import HapteraAPI
import HapteraHost

package enum OutputFormat: String, ExpressibleByArgument, CaseIterable, Sendable {
    case table
    case wide
    case json
    case yaml
}

/// What every command takes.
package struct GlobalOptions: ParsableArguments {
    @Option(name: [.short, .customLong("output")], help: "table, wide, json or yaml.")
    package var output = OutputFormat.table

    @Option(help: "HOST:PORT of the controller; otherwise $HAPTERA_SERVER, then the context.")
    package var server: String?

    @Option(help: "The context to use instead of the current one.")
    package var context: String?

    @Option(help: "How long to wait for the outcome: seconds, or with a unit, as in 2m.")
    package var timeout: Timeout = Timeout(seconds: 60)

    @Flag(name: .shortAndLong, help: "Print names only, and no progress.")
    package var quiet = false

    package init() {}

    package func validate() throws {
        if let server, Names.hostAndPort(server) == nil {
            throw ValidationError("--server '\(server)' is not HOST:PORT")
        }
    }
}

package struct Timeout: ExpressibleByArgument, Equatable, Sendable {
    package var seconds: Int
    package init(seconds: Int) { self.seconds = seconds }
    package init?(argument: String) {
        let units: [Character: Int] = ["s": 1, "m": 60, "h": 3600]
        let multiplier = argument.last.flatMap { units[$0] }
        let digits = multiplier == nil ? argument[...] : argument.dropLast()
        guard let count = Int(digits), count > 0, count <= 86_400 else { return nil }
        seconds = count * (multiplier ?? 1)
    }
    package init(typed: String) throws {
        guard let time = Self(argument: typed) else {
            throw ValidationError("'\(typed)' is no time: use 30s, 5m, 2h, or seconds, 1 or more")
        }
        self = time
    }
    package var defaultValueDescription: String { "\(seconds)s" }
}

package typealias Transport = HTTP2ClientTransport.Posix

/// One command's connection to a controller, its deadline and its way of speaking.
package struct Session: Sendable {
    package let server: String
    package let options: GlobalOptions
    package let client: GRPCClient<Transport>
    package let deadline: ContinuousClock.Instant

    package var volumes: Haptera_V1_VolumeService.Client<Transport> { .init(wrapping: client) }
    package var schedules: Haptera_V1_ScheduleService.Client<Transport> { .init(wrapping: client) }
    package var cluster: Haptera_V1_ClusterService.Client<Transport> { .init(wrapping: client) }

    /// Connects to the server the options, the environment or the context name.
    package static func run<Result: Sendable>(
        _ options: GlobalOptions, server: String? = nil,
        _ body: @Sendable (Session) async throws -> Result
    ) async throws -> Result {
        let server = try server ?? resolve(options)
        guard let (host, port) = Names.hostAndPort(server) else {
            throw CommandFailure(.usage, "the server '\(server)' is not HOST:PORT")
        }
        let deadline = ContinuousClock.now + .seconds(options.timeout.seconds)
        do {
            return try await withGRPCClient(
                transport: .http2NIOPosix(
                    target: .dns(host: host, port: port), transportSecurity: .plaintext),
                interceptors: [ActorInterceptor()]
            ) { client in
                try await body(
                    Session(server: server, options: options, client: client, deadline: deadline))
            }
        } catch let error as RPCError {
            throw failure(error, server)
        }
    }

    package static func resolve(
        _ options: GlobalOptions,
        environment: [String: String] = ProcessInfo.processInfo.environment
    ) throws -> String {
        if let server = options.server { return server }
        if options.context == nil, let server = environment["HAPTERA_SERVER"], !server.isEmpty {
            return server
        }
        let contexts = try Contexts.load(Contexts.path(environment))
        guard let context = try contexts.context(named: options.context)?.context else {
            throw CommandFailure(
                .usage,
                "no server is known: start a cluster with 'storagectl cluster up --dir "
                    + "DIR', or name one with --server HOST:PORT")
        }
        return context.server
    }

    package static func failure(_ error: RPCError, _ server: String) -> CommandFailure {
        switch error.code {
        case .notFound: return CommandFailure(.notFound, error.message)
        case .alreadyExists, .failedPrecondition, .aborted:
            return CommandFailure(.conflict, error.message)
        case .invalidArgument: return CommandFailure(.usage, error.message)
        case .unavailable:
            return CommandFailure(
                .unavailable,
                "the controller at \(server) cannot be reached: \(brief(error)); "
                    + "see 'storagectl cluster up' or check --server")
        case .deadlineExceeded:
            return CommandFailure(
                .unavailable,
                "the controller at \(server) did not answer in time; try again, or "
                    + "allow more with --timeout")
        default: return CommandFailure(.failed, "\(error.message) (from \(server))")
        }
    }

    /// For one request: it ends with the command's deadline.
    package var callOptions: CallOptions {
        var options = CallOptions.defaults
        options.timeout = max(deadline - ContinuousClock.now, .milliseconds(1))
        options.waitForReady = false
        return options
    }

    package var isPastDeadline: Bool { ContinuousClock.now >= deadline }

    // MARK: Speaking

    /// Prints a value in the format asked for; `quiet` are the names `--quiet` leaves, and `text`
    /// is the form for people.
    package func say(
        _ value: OutputValue, quiet: String? = nil, text: (_ wide: Bool) -> String
    ) {
        switch options.output {
        case .json: print(value.json())
        case .yaml: print(value.yaml)
        case .table, .wide:
            let line = options.quiet ? quiet ?? "" : text(options.output == .wide)
            if !line.isEmpty { print(line) }
        }
    }
}

/// One line on the terminal that is overwritten; nothing if there is no terminal.
package struct Progress: Sendable {
    package let isOn: Bool
    package init(_ options: GlobalOptions) { isOn = !options.quiet && isatty(2) == 1 }

    package func show(_ text: String) { write("\r\u{1b}[K\(text)") }
    package func clear() { write("\r\u{1b}[K") }

    /// A line for people, on standard error.
    package static func complain(_ text: String, newline: Bool = true) {
        FileHandle.standardError.write(Data((text + (newline ? "\n" : "")).utf8))
    }

    private func write(_ text: String) {
        if isOn { FileHandle.standardError.write(Data(text.utf8)) }
    }
}

/// Says who asks, for the events.
private struct ActorInterceptor: ClientInterceptor {
    private static let actor: String = {
        let environment = ProcessInfo.processInfo.environment
        let user = environment["SUDO_USER"] ?? NSUserName()
        return "\(user)@\(ProcessInfo.processInfo.hostName)"
    }()

    func intercept<Input: Sendable, Output: Sendable>(
        request: StreamingClientRequest<Input>, context: ClientContext,
        next: (StreamingClientRequest<Input>, ClientContext) async throws ->
            StreamingClientResponse<Output>
    ) async throws -> StreamingClientResponse<Output> {
        var request = request
        request.metadata.addString(Self.actor, forKey: "haptera-actor")
        return try await next(request, context)
    }
}
