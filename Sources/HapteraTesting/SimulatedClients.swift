import HapteraCore

// The clients of a world: workers that issue requests to the current engine, hold on to what is not
// answered when it dies, and give it to the next one first, as the kernel's client does.

extension World {
    func newOperation(
        _ draw: (kind: OperationKind, flags: OperationFlags, offset: UInt64, length: Int),
        worker: Int
    ) -> ClientOperation {
        let operation = ClientOperation(
            id: operations.count + 1, kind: draw.kind, flags: draw.flags, offset: draw.offset,
            length: draw.length, worker: worker, generation: generation)
        operation.startedAfter = acknowledgedEpoch
        operation.begunAt = promises.acknowledgements
        operations.append(operation)
        history.append(.invoked(operation), step: timeline.step)
        promises.began(operation)
        if operation.kind == .status {
            operation.promised = operation.sectors.map { promises.acknowledged[$0] }
            operation.losses = promises.losses
        }
        return operation
    }

    /// A worker's turn: one more request, unless it waits for too many already.
    func work(_ worker: Int) {
        guard isChaos else { return }
        let pause =
            random.permille(600)
            ? random.delay(microseconds: 10, 500)
            : milliseconds(random.below(workload.thinkMillisecondsMax) + 1)
        timeline.schedule(after: pause, .work(worker: worker))
        guard reverts.pending == nil, let current = currentEngine,
            outstanding(worker) < workload.depth
        else { return }
        if let stale = staleEngine(), random.permille(300) {
            // Somebody still talks to an engine that was superseded; nobody repeats what it says.
            var draw = workload.draw(random)
            if random.permille(600), draw.kind == .write { (draw.kind, draw.flags) = (.read, []) }
            let most =
                draw.kind == .read ? Workload.staleReadsMax : Workload.staleRequestsMax
            let waiting = operations.count {
                $0.worker < 0 && $0.isOutstanding && ($0.kind == .read) == (draw.kind == .read)
            }
            // Nor what others have asked for and may repeat: that would be two clients of one
            // block.
            let end = draw.offset + UInt64(draw.length)
            let isDisputed =
                draw.kind != .read
                && unanswered.contains {
                    $0.offset < end && draw.offset < $0.offset + UInt64($0.length)
                }
            if waiting < most, !isDisputed, isWithin(stale, draw.offset, draw.length) {
                submit(newOperation(draw, worker: -1), to: stale)
                return
            }
        }
        let draw = workload.draw(random)
        guard isWithin(engines[current], draw.offset, draw.length) else { return }
        submit(newOperation(draw, worker: worker), to: engines[current])
    }

    func writeFreshBlock() {
        let size = Geometry.blockSize
        guard isChaos, reverts.pending == nil, let current = currentEngine,
            let last = workload.freshBlocks.last,
            isWithin(engines[current], last * UInt64(size), size),
            let block = workload.freshBlocks.popLast()
        else { return }
        let operation = newOperation((.write, [], block * UInt64(size), size), worker: 0)
        submit(operation, to: engines[current])
    }

    private func outstanding(_ worker: Int) -> Int {
        unanswered.count { $0.worker == worker }
    }
    private func staleEngine() -> SimulatedEngine? {
        engines.last { $0.isRunning && $0.index != currentEngine && $0.generation == generation }
    }

    func submit(_ operation: ClientOperation, to engine: SimulatedEngine) {
        if operation.firstEngine < 0 { operation.firstEngine = engine.index }
        operation.engine = engine.index
        if operation.worker >= 0 && !unanswered.contains(where: { $0 === operation }) {
            unanswered.append(operation)
        }
        // On its way on a connection that is broken: it may arrive all the same, and be repeated.
        guard !engine.isSessionDead || operation.worker < 0 else {
            return engine.late.append(operation)
        }
        engine.unsent.append(operation)
        submitUnsent(engine)
    }

    /// The clients' connection breaks. The engine does not notice, and bytes that are on their way
    /// still arrive; what it answers is lost.
    func cutClients() {
        guard let current = currentEngine, engines[current].isRunning,
            !engines[current].isSessionDead
        else { return }
        note("fault: the clients lose their connection to \(engines[current].name)")
        engines[current].isSessionDead = true
        if random.permille(200), let operation = unanswered.first {
            // Its patience is at an end: whether it happened is not known.
            operation.isAbandoned = true
            unanswered.removeAll { $0 === operation }
        }
        timeline.schedule(
            after: milliseconds(random.between(1, 3000)), .relief(.clients(engine: current)))
    }

    /// The clients are back on a new connection and repeat what was not answered. What is held of
    /// the old session is fenced (it never happens) or drained before anything new is served.
    func reconnectClients(_ engine: SimulatedEngine) {
        guard engine.isSessionDead else { return }
        guard engine.pausedUntil <= timeline.now else {
            return timeline.schedule(
                at: engine.pausedUntil + 1000, .relief(.clients(engine: engine.index)))
        }
        engine.isSessionDead = false
        guard engine.isRunning, engine.index == currentEngine else { return }
        note("the clients connect to \(engine.name) again")
        coverage.took(.reconnection)
        if random.permille(500) {
            // Arrived before the engine noticed.
            engine.unsent += engine.late
            engine.late = []
            submitUnsent(engine)
        }
        engine.unsent = []
        engine.session += 1
        if options.rulesOff.contains(.oldSessionNotFenced) {
            timeline.schedule(
                after: milliseconds(random.between(1, 300)), .lateBytes(engine: engine.index))
        } else {
            engine.late = []
            engine.leftovers = engine.attempts.count { $0.completions == 0 }
            step(engine, .cancel(session: engine.session - 1))
        }
        for operation in unanswered where operation.isOutstanding {
            operation.engine = engine.index
            engine.unsent.append(operation)
        }
        submitUnsent(engine)
    }

    /// What was on its way on the old connection arrives after all.
    func deliverLate(_ engine: SimulatedEngine) {
        while let operation = engine.late.popLast(), engine.isRunning, engine.core.canSubmit {
            guard let buffer = fillBuffer(operation, engine.pool) else { return }
            handOver(operation, engine, buffer, session: 0)
        }
    }

    /// Hands over what the engine has room for, in order.
    func submitUnsent(_ engine: SimulatedEngine) {
        guard engine.isRunning, !engine.isSubmitting, engine.pausedUntil == 0,
            engine.leftovers == 0
        else { return }
        engine.isSubmitting = true
        defer { engine.isSubmitting = false }
        while let operation = engine.unsent.first, engine.core.canSubmit, engine.isRunning {
            guard let buffer = fillBuffer(operation, engine.pool) else { return }
            engine.unsent.removeFirst()
            handOver(operation, engine, buffer, session: engine.session)
        }
    }

    private func handOver(
        _ operation: ClientOperation, _ engine: SimulatedEngine, _ buffer: BufferID,
        session: UInt32
    ) {
        trace("client -> \(engine.name) \(operation.text)")
        operation.attempts += 1
        engine.attempts.append(.init(operation: operation, session: session))
        var request = Operation(
            kind: requestKind(operation), flags: operation.flags, offset: operation.offset,
            length: operation.length, buffer: buffer,
            userData: UInt64(engine.attempts.count - 1))
        request.session = session
        step(engine, .submit(request))
    }

    /// What the client sends: some have no other way to zero than to write zeroes.
    private func requestKind(_ operation: ClientOperation) -> OperationKind {
        let writesZeroes = detectsZeroes && operation.kind == .writeZeroes && operation.id % 2 == 0
        return writesZeroes ? .write : operation.kind
    }

    /// A buffer with the write's content (or room for what is read); nil if the pool is empty.
    private func fillBuffer(_ operation: ClientOperation, _ pool: BufferPool) -> BufferID? {
        let kind = requestKind(operation)
        guard kind == .read || kind == .write || kind == .status else { return BufferID.none }
        let blockSize = UInt64(Geometry.blockSize)
        let blocks = Geometry.blocks(offset: operation.offset, length: operation.length)
        // The engine's jobs and edges must find buffers too.
        guard pool.available(blocks.count * Int(blockSize)) > 4,
            let buffer = pool.allocate(blocks.count * Int(blockSize))
        else { return nil }
        guard kind == .write else { return buffer }
        let memory = pool.memory(buffer)
        var position = Int(operation.offset % blockSize)
        for sector in operation.sectors {
            contents.fill(
                memory.slice(position, Content.sectorSize), value: operation.value,
                sector: UInt64(sector))
            position += Content.sectorSize
        }
        return buffer
    }

    /// An engine answered.
    func completed(
        _ engine: SimulatedEngine, _ id: Int, _ result: OperationResult, buffer: BufferID,
        tableLength: Int, isHole: Bool
    ) {
        let operation = engine.attempts[id].operation
        let isCurrent = engine.attempts[id].session == engine.session
        defer { if buffer != .none { engine.pool.release(buffer) } }
        trace("\(engine.name) -> client \(operation.text): \(result)")
        engine.attempts[id].completions += 1
        check(32, engine.attempts[id].completions == 1, "\(operation.text) is answered twice")
        if !isCurrent && engine.leftovers > 0 { engine.leftovers -= 1 }
        guard isCurrent, !engine.isSessionDead || operation.worker < 0 else { return }
        guard operation.isOutstanding, operation.engine == engine.index else { return }
        switch result {
        case .shuttingDown, .cancelled:
            // Nothing is known of it: it waits for the next engine.
            if operation.worker < 0 { operation.isAbandoned = true }
        case .ioError, .noSpace:
            operation.isAbandoned = true
            unanswered.removeAll { $0 === operation }
            observeError(operation, result)
        case .ok:
            let isStale = store.record.engine != engine.instance
            operation.isComplete = true
            unanswered.removeAll { $0 === operation }
            if operation.kind == .read {
                readCompleted(operation, engine, buffer, isHole: isHole)
            }
            observeAcknowledgement(operation, engine)
            history.append(.returned(operation), step: timeline.step)
            // A superseded engine may tell late of a write that others have been laid over since.
            if !isStale { promises.ended(operation) }
            if operation.kind == .status, !isStale {
                judgeStatus(operation, engine, buffer, length: tableLength)
            }
            if operation.kind == .flush { audit() }
        }
    }

    private func readCompleted(
        _ operation: ClientOperation, _ engine: SimulatedEngine, _ buffer: BufferID,
        isHole: Bool
    ) {
        let memory = engine.pool.memory(buffer)
        var position = Int(operation.offset % UInt64(Geometry.blockSize))
        var values: [ValueID] = []
        for sector in operation.sectors {
            let value = contents.value(
                in: memory.slice(position, Content.sectorSize), sector: UInt64(sector))
            position += Content.sectorSize
            check(
                27, value != Content.garbage,
                "\(operation.text) returned what nobody wrote to sector \(sector)")
            guard failure == nil else { return }
            if isHole && value != 0 { return fail("\(operation.text): a hole with data in it") }
            observeReadValue(operation, engine, value, sector: sector)
            values.append(value)
        }
        operation.values = values
    }

    /// 27: what is said to read zero does: it did when the request was made, or was made to since.
    private func judgeStatus(
        _ operation: ClientOperation, _ engine: SimulatedEngine, _ buffer: BufferID, length: Int
    ) {
        let table = engine.pool.memory(buffer)
        var sector = Int(operation.offset) / Content.sectorSize
        for at in stride(from: 0, to: length, by: 16) {
            let next = sector + Int(table.load(UInt64.self, at)) / Content.sectorSize
            defer { sector = next }
            guard table.load(UInt32.self, at + 8) != UInt32(BlockState.data.rawValue),
                operation.losses == promises.losses
            else { continue }
            for (index, place) in operation.sectors.enumerated()
            where place >= sector && place < next && operation.promised[index] != 0 {
                check(
                    27, isAcceptable(0, place, operation.promised[index]),
                    "\(operation.text) says that sector \(place) reads zero")
            }
        }
    }

    /// The clients (a kernel's NBD device) move to the engine, all at once: what is unanswered
    /// first.
    func attach(to engine: SimulatedEngine) {
        let waiting = unanswered
        unanswered = []
        for operation in waiting where operation.isOutstanding {
            engines[max(operation.engine, 0)].unsent.removeAll { $0 === operation }
            submit(operation, to: engine)
        }
    }

    /// The clients' host is gone with all it held: a new generation begins.
    func loseClients() {
        for operation in operations where operation.isOutstanding { operation.isAbandoned = true }
        for engine in engines { engine.unsent = [] }
        unanswered = []
        generation += 1
        isGenerationUnserved = true
        note("the clients are gone; generation \(generation) begins")
    }
}
