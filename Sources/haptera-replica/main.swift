import Glibc
import HapteraReplica

exit(ReplicaCommand.run(Array(CommandLine.arguments.dropFirst())))
