import GRPCCore
import HapteraAPI

struct ScheduleService: Haptera_V1_ScheduleService.SimpleServiceProtocol {
    let controller: Controller

    func createSchedule(
        request: Haptera_V1_CreateScheduleRequest, context: ServerContext
    ) async throws -> Haptera_V1_Schedule {
        try await controller.createSchedule(request.specification)
    }

    func updateSchedule(
        request: Haptera_V1_UpdateScheduleRequest, context: ServerContext
    ) async throws -> Haptera_V1_Schedule {
        try await controller.updateSchedule(request)
    }

    func getSchedule(
        request: Haptera_V1_ScheduleRequest, context: ServerContext
    ) async throws -> Haptera_V1_Schedule {
        try await controller.schedule(named: request.name)
    }

    func listSchedules(
        request: Haptera_V1_ListSchedulesRequest, context: ServerContext
    ) async throws -> Haptera_V1_ListSchedulesResponse {
        var response = Haptera_V1_ListSchedulesResponse()
        response.schedules = try await controller.schedules()
        return response
    }

    func deleteSchedule(
        request: Haptera_V1_ScheduleRequest, context: ServerContext
    ) async throws -> Haptera_V1_DeleteScheduleResponse {
        try await controller.deleteSchedule(request.name)
        return Haptera_V1_DeleteScheduleResponse()
    }

    func pauseSchedule(
        request: Haptera_V1_ScheduleRequest, context: ServerContext
    ) async throws -> Haptera_V1_Schedule {
        try await controller.pauseSchedule(request.name, isPaused: true)
    }

    func resumeSchedule(
        request: Haptera_V1_ScheduleRequest, context: ServerContext
    ) async throws -> Haptera_V1_Schedule {
        try await controller.pauseSchedule(request.name, isPaused: false)
    }
}
