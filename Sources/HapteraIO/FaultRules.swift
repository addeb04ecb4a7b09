import HapteraCore

/// Faults for system tests, from the environment's HAPTERA_FAULTS. Nothing is ever injected unless
/// it is set, and then a warning is logged. Grammar:
///
///     rules     = rule { ";" rule }
///     rule      = operation ":" label ":" effect [ ":" when ]
///     operation = "read" | "write" | "sync" | "punch" | "any"
///     label     = the label a file was registered with ("data", "table", ...) | "any"
///     effect    = ERRNO             fails without reaching the disk: EIO, ENOSPC, ...
///               | "after-" ERRNO    is carried out, then reported as failed
///               | "skip"            reported as done without reaching the disk
///               | "short" [ "=" N ] a read or write moves N (half) of its bytes
///               | "delay=" MS       the completion arrives MS milliseconds late
///     when      = "at=" N           only the Nth matching operation (from 1)
///               | "every=" N        each Nth
///               | "from=" N         the Nth and all later ones
///
/// Without `when` every matching operation is hit. The first rule that hits decides.
package final class FaultRules: CompletionFault {
    enum Effect: Equatable {
        case fixed(FaultEffect)
        case half
    }
    enum When: Equatable {
        case at(UInt64), every(UInt64), from(UInt64)
    }
    struct Rule: Equatable {
        /// Nil: any.
        var kind: FileOperation.Kind?
        var label: String?
        var effect: Effect
        var when: When
        var seen: UInt64 = 0
    }
    private(set) var rules: [Rule]

    package init(parsing text: String) throws(IOError) {
        rules = []
        for part in text.split(separator: ";") { rules.append(try Self.parse(String(part))) }
        guard !rules.isEmpty else { throw IOError("HAPTERA_FAULTS has no rule") }
    }

    /// Installs the rules of HAPTERA_FAULTS, if it is set and not empty.
    package static func installFromEnvironment(_ reactor: Reactor) throws(IOError) {
        guard let text = environment("HAPTERA_FAULTS"), !text.isEmpty else { return }
        reactor.completionFault = try FaultRules(parsing: text)
        Log.warn("INJECTING FAULTS into file I/O: not for production", ("rules", text))
    }

    package func effect(of operation: FileOperation, label: String) -> FaultEffect {
        let isTransfer = operation.kind == .read || operation.kind == .write
        for index in rules.indices {
            guard rules[index].kind == nil || rules[index].kind == operation.kind,
                rules[index].label == nil || rules[index].label == label
            else { continue }
            rules[index].seen += 1
            guard Self.isHit(rules[index].when, rules[index].seen) else { continue }
            switch rules[index].effect {
            case .fixed(.short(let count)) where isTransfer: return .short(count)
            case .half where isTransfer: return .short(operation.length / 2)
            case .fixed(.short), .half: continue
            case .fixed(let effect): return effect
            }
        }
        return .none
    }

    private static func isHit(_ when: When, _ count: UInt64) -> Bool {
        switch when {
        case .at(let n): count == n
        case .every(let n): count % n == 0
        case .from(let n): count >= n
        }
    }

    private static func parse(_ text: String) throws(IOError) -> Rule {
        let parts = text.split(separator: ":", omittingEmptySubsequences: false).map(String.init)
        guard parts.count == 3 || parts.count == 4, !parts[1].isEmpty else {
            throw refusal(text, "it must be operation:label:effect[:when]")
        }
        let kinds: [String: FileOperation.Kind] = [
            "read": .read, "write": .write, "sync": .sync, "punch": .punch,
        ]
        guard parts[0] == "any" || kinds[parts[0]] != nil else {
            throw refusal(text, "unknown operation '\(parts[0])'")
        }
        return Rule(
            kind: kinds[parts[0]], label: parts[1] == "any" ? nil : parts[1],
            effect: try parseEffect(parts[2], text),
            when: parts.count == 4 ? try parseWhen(parts[3], text) : .from(1))
    }
    private static func parseEffect(_ effect: String, _ rule: String) throws(IOError) -> Effect {
        if effect == "short" { return .half }
        if effect == "skip" { return .fixed(.skip) }
        if effect.hasPrefix("short="), let count = UInt32(effect.dropFirst(6)) {
            return .fixed(.short(Int(count)))
        }
        if effect.hasPrefix("delay="), let milliseconds = UInt32(effect.dropFirst(6)) {
            return .fixed(.delay(milliseconds: Int(milliseconds)))
        }
        if effect.hasPrefix("after-"), let number = errorNumber(effect.dropFirst(6)) {
            return .fixed(.failAfter(errno: number))
        }
        guard let number = errorNumber(effect) else {
            throw refusal(rule, "unknown effect '\(effect)'")
        }
        return .fixed(.fail(errno: number))
    }
    private static func parseWhen(_ when: String, _ rule: String) throws(IOError) -> When {
        let parts = when.split(separator: "=", maxSplits: 1)
        guard parts.count == 2, let count = UInt64(parts[1]), count > 0 else {
            throw refusal(rule, "'\(when)' must be at=N, every=N or from=N with N from 1")
        }
        switch parts[0] {
        case "at": return .at(count)
        case "every": return .every(count)
        case "from": return .from(count)
        default: throw refusal(rule, "'\(when)' must be at=N, every=N or from=N")
        }
    }
    private static func refusal(_ rule: String, _ reason: String) -> IOError {
        IOError("HAPTERA_FAULTS rule '\(rule)': \(reason)")
    }
}
