#include "COpenSSL.h"

#include <openssl/evp.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key;
static EVP_MD *algorithm;

static void release(void *context) { EVP_MD_CTX_free(context); }

// Looking the algorithm up costs more than hashing a block: once per process.
static void prepare(void) {
    algorithm = EVP_MD_fetch(NULL, "SHA256", NULL);
    if (!algorithm || pthread_key_create(&key, release)) abort();
}

void haptera_sha256_prefix(const void *data, size_t length, uint64_t prefix[2]) {
    pthread_once(&once, prepare);
    EVP_MD_CTX *context = pthread_getspecific(key);
    if (!context) {
        context = EVP_MD_CTX_new();
        if (!context || pthread_setspecific(key, context)) abort();
    }
    unsigned char digest[EVP_MAX_MD_SIZE];
    if (!EVP_DigestInit_ex2(context, algorithm, NULL) ||
        !EVP_DigestUpdate(context, data, length) ||
        !EVP_DigestFinal_ex(context, digest, NULL)) {
        abort();
    }
    memcpy(prefix, digest, 16); // little-endian hosts only
}
