import HapteraCore

/// Runs one seed from beginning to end.
package func simulate(seed: UInt64, options: SimulationOptions = SimulationOptions())
    -> SimulationOutcome
{
    World(seed: seed, options: options).run()
}
