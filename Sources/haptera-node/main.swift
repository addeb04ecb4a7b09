import ArgumentParser
import HapteraControl
import HapteraHost
import Logging

struct NodeCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "haptera-node",
        abstract: "Runs this host's engines and replicas as the controller wants them.",
        discussion: """
            Engines and replicas survive the end of this program; its next start finds them again.
            """,
        version: HapteraVersion.text)

    @Option(help: "HOST:PORT of the controller's gRPC API.")
    var controller: String

    @Option(help: "The node's name in the cluster: \(Names.labelRule).")
    var name: String

    @Option(help: "Where replicas, logs and sockets are kept.")
    var dir: String

    @Option(help: "Address under which engines and clients reach this node's processes.")
    var address = "127.0.0.1"

    @Option(help: "TCP ports to give to engines and replicas, FIRST-LAST.")
    var ports = "\(Ports.defaultRange.lowerBound)-\(Ports.defaultRange.upperBound)"

    @Option(help: "trace, debug, info, notice, warning or error.")
    var logLevel = Logger.Level.info

    func validate() throws {
        guard Names.hostAndPort(controller) != nil else {
            throw ValidationError("--controller '\(controller)' is not HOST:PORT")
        }
        guard Names.isValidLabel(name) else {
            throw ValidationError("'\(name)' is no node name: use \(Names.labelRule)")
        }
        guard Names.hostAndPort(Names.endpoint(host: address, port: 1)) != nil else {
            throw ValidationError("--address '\(address)' is not a host name or IP address")
        }
        guard Ports.parseRange(ports) != nil else {
            throw ValidationError("--ports '\(ports)' is not FIRST-LAST within 1-65535")
        }
    }

    func run() async throws {
        guard let controller = Names.hostAndPort(controller), let ports = Ports.parseRange(ports)
        else { return }
        try await NodeProcess(
            controller: controller, name: name, directory: dir, address: address, ports: ports
        ).run(logger: Daemon.logger("haptera-node", level: logLevel))
    }
}

await Daemon.main(NodeCommand.self)
