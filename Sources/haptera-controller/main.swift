import ArgumentParser
import HapteraControl
import HapteraHost
import Logging

struct ControllerCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "haptera-controller",
        abstract: "Holds the cluster's desired state and serves its API.",
        version: HapteraVersion.text)

    @Option(help: "Where the metadata store is kept.")
    var dir: String

    @Option(help: "HOST:PORT of the gRPC API.")
    var listen = "127.0.0.1:7780"

    @Option(help: "HOST:PORT of the record service, which engines use.")
    var records = "127.0.0.1:7781"

    @Option(help: "HOST:PORT under which engines on other hosts reach the record service.")
    var advertiseRecords: String?

    @Option(help: "trace, debug, info, notice, warning or error.")
    var logLevel = Logger.Level.info

    func validate() throws {
        for text in [listen, records, advertiseRecords ?? listen]
        where Names.hostAndPort(text) == nil {
            throw ValidationError("'\(text)' is not HOST:PORT")
        }
    }

    func run() async throws {
        guard let listen = Names.hostAndPort(listen), let records = Names.hostAndPort(records)
        else { return }
        try await ControllerProcess(
            directory: dir, listen: listen, records: records, advertisedRecords: advertiseRecords
        ).run(logger: Daemon.logger("haptera-controller", level: logLevel))
    }
}

await Daemon.main(ControllerCommand.self)
