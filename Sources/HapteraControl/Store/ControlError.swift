import GRPCCore

/// Why the controller refuses a request, in words for the person who made it.
package struct ControlError: Error, Equatable, Sendable, CustomStringConvertible {
    package enum Code: Sendable {
        case invalid
        case notFound
        case conflict
        case precondition
        case unavailable
        /// Nobody knows whether it was done.
        case inDoubt
    }
    package var code: Code
    package var message: String

    package init(_ code: Code, _ message: String) {
        self.code = code
        self.message = message
    }

    package var description: String { message }
}

extension ControlError: RPCErrorConvertible {
    package var rpcErrorCode: RPCError.Code {
        switch code {
        case .invalid: .invalidArgument
        case .notFound: .notFound
        case .conflict: .alreadyExists
        case .precondition: .failedPrecondition
        case .unavailable: .unavailable
        case .inDoubt: .deadlineExceeded
        }
    }
    package var rpcErrorMessage: String { message }
    package var rpcErrorMetadata: Metadata { [:] }
    package var rpcErrorCause: (any Error)? { nil }
}
