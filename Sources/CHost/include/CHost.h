#ifndef CHOST_H
#define CHOST_H
#include <spawn.h>

// What Swift's Glibc module does not show because it needs _GNU_SOURCE.

/// In the child: close every descriptor from `first` on. Returns 0 or an errno value.
int host_spawn_close_from(posix_spawn_file_actions_t *actions, int first);
/// POSIX_SPAWN_SETSID.
short host_spawn_new_session(void);

#endif
