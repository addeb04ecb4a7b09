import HapteraCore
import HapteraIO

/// Faults for system tests, from the environment: HAPTERA_FAULTS is a comma-separated list of
///
///     OPERATION:FILE:EFFECT[:every=N | :at=N]
///
/// OPERATION is read, write, sync or punch; FILE data, table, log or manifest; EFFECT the name of an
/// errno (EIO, ENOSPC), `short=BYTES` or `delay=MILLISECONDS`. `every=N` hits each Nth such
/// operation, `at=N` the Nth only; without either, all.
package final class FaultRules: CompletionFault {
    private struct Rule {
        var kind: FileOperation.Kind
        var label: String
        var effect: FaultEffect
        var every: Int
        var at: Int
        var seen = 0
    }
    private var rules: [Rule] = []

    /// Nil if the text makes no sense.
    package init?(_ text: String) {
        for part in text.split(separator: ",") {
            let fields = part.split(separator: ":").map(String.init)
            guard fields.count == 3 || fields.count == 4, let kind = Self.kind(fields[0]),
                ["data", "table", "log", "manifest"].contains(fields[1]),
                let effect = Self.effect(fields[2])
            else { return nil }
            var rule = Rule(kind: kind, label: fields[1], effect: effect, every: 1, at: 0)
            if fields.count == 4 {
                let choice = fields[3].split(separator: "=")
                guard choice.count == 2, let number = Int(choice[1]), number > 0 else {
                    return nil
                }
                switch choice[0] {
                case "every": rule.every = number
                case "at": rule.at = number
                default: return nil
                }
            }
            rules.append(rule)
        }
        if rules.isEmpty { return nil }
    }

    private static func kind(_ text: String) -> FileOperation.Kind? {
        switch text {
        case "read": .read
        case "write": .write
        case "sync": .sync
        case "punch": .punch
        default: nil
        }
    }
    private static func effect(_ text: String) -> FaultEffect? {
        switch text {
        case "EIO": return .fail(errno: 5)
        case "ENOSPC": return .fail(errno: 28)
        default: break
        }
        let parts = text.split(separator: "=")
        guard parts.count == 2, let number = Int(parts[1]), number >= 0 else { return nil }
        switch parts[0] {
        case "short": return .short(number)
        case "delay": return .delay(milliseconds: number)
        default: return nil
        }
    }

    package func effect(of operation: FileOperation, label: String) -> FaultEffect {
        for index in rules.indices
        where rules[index].kind == operation.kind && rules[index].label == label {
            rules[index].seen += 1
            let seen = rules[index].seen
            let isHit =
                rules[index].at > 0
                ? seen == rules[index].at : seen % rules[index].every == 0
            if isHit { return rules[index].effect }
        }
        return .none
    }
}
