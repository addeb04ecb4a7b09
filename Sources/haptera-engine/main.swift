import HapteraEngine

EngineCommand.main()
