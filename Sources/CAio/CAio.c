#include "CAio.h"
