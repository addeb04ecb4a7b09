// liburing for Swift. <sys/select.h> comes first: without it liburing's headers and the Swift
// importer's glibc module can define fd_set twice.
#ifndef HAPTERA_CURING_H
#define HAPTERA_CURING_H
#include <sys/select.h>
#include <liburing.h>
#endif
