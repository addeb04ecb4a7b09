// libaio for Swift: the fallback where the kernel refuses io_uring.
#ifndef HAPTERA_CAIO_H
#define HAPTERA_CAIO_H
#include <sys/select.h>
#include <libaio.h>
#endif
