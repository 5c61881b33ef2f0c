/* "vsock echo PORT" sends back each message of a SOCK_SEQPACKET connection; "vsock messages PORT" sends the host some, of all lengths, and compares what comes back.
   Copies between a vsock connection and standard input and output: "vsock listen PORT" sends back what comes, "vsock connect PORT" talks to the host. */
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

static int echo(int talk)
{
    ssize_t length;
    while ((length = recv(talk, bytes, sizeof bytes, 0)) > 0)
        if (send(talk, bytes, length, 0) != length)
            return fail("send");
    return length < 0 ? fail("recv") : 0;
}

static int messages(int talk)
{
    static const int lengths[] = { 1, 100, 4096, 5000, 65536, 7, 0 };
    static char back[sizeof bytes];
    for (int i = 0; lengths[i]; i++) {
        memset(bytes, 'a' + i, lengths[i]);
        if (send(talk, bytes, lengths[i], 0) != lengths[i])
            return fail("send");
    }
    for (int i = 0; lengths[i]; i++) {
        memset(bytes, 'a' + i, lengths[i]);
        ssize_t length = recv(talk, back, sizeof back, 0);
        if (length != lengths[i] || memcmp(bytes, back, length))
            return fprintf(stderr, "message %d came back with %d bytes\n", i, (int)length);
    }
    puts("all came back");
    return 0;
}

int main(int count, char **words)
{
    struct sockaddr_vm address = { .svm_family = AF_VSOCK };
    if (count != 3)
        return 2;
    int whole = strcmp(words[1], "echo") == 0 || strcmp(words[1], "messages") == 0;
    int talk = socket(AF_VSOCK, whole ? SOCK_SEQPACKET : SOCK_STREAM, 0);
    if (talk < 0)
        return fail("socket");
    address.svm_port = atoi(words[2]);
    if (strcmp(words[1], "listen") == 0 || strcmp(words[1], "echo") == 0) {
        address.svm_cid = VMADDR_CID_ANY;
        if (bind(talk, (struct sockaddr *)&address, sizeof address) || listen(talk, 1))
            return fail("listen");
        puts("listening");
        fflush(stdout);
        int client = accept(talk, 0, 0);
        return client < 0 ? fail("accept") : whole ? echo(client) : copy(client, client);
    }
    address.svm_cid = VMADDR_CID_HOST;
    if (connect(talk, (struct sockaddr *)&address, sizeof address))
        return fail("connect");
    if (whole)
        return messages(talk);
    return copy(0, talk) || shutdown(talk, SHUT_WR) || copy(talk, 1);
}
