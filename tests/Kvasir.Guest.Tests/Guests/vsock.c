/* Copies between a vsock connection and standard input and output: "vsock listen PORT" sends back what comes, "vsock connect PORT" talks to the host. */
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char bytes[65536];

static int fail(const char *what)
{
    perror(what);
    return 1;
}

static int copy(int from, int to)
{
    ssize_t length, done;
    while ((length = read(from, bytes, sizeof bytes)) > 0)
        for (ssize_t at = 0; at < length; at += done)
            if ((done = write(to, bytes + at, length - at)) < 0)
                return fail("write");
    return length < 0 ? fail("read") : 0;
}

int main(int count, char **words)
{
    struct sockaddr_vm address = { .svm_family = AF_VSOCK };
    int talk = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (count != 3 || talk < 0)
        return fail("socket");
    address.svm_port = atoi(words[2]);
    if (strcmp(words[1], "listen") == 0) {
        address.svm_cid = VMADDR_CID_ANY;
        if (bind(talk, (struct sockaddr *)&address, sizeof address) || listen(talk, 1))
            return fail("listen");
        puts("listening");
        fflush(stdout);
        int client = accept(talk, 0, 0);
        return client < 0 ? fail("accept") : copy(client, client);
    }
    address.svm_cid = VMADDR_CID_HOST;
    if (connect(talk, (struct sockaddr *)&address, sizeof address))
        return fail("connect");
    return copy(0, talk) || shutdown(talk, SHUT_WR) || copy(talk, 1);
}
