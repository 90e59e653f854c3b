/* floor: the least a server can do for a request, for comparison: accept, recv, send a fixed
 * answer, close; one process, one connection after the other, no look at what was asked.
 *
 *   floor SOCKET        (prints `ready` when it listens; ends at a signal)
 */
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const char ANSWER[] =
    "{\"error\": 0, \"data\": {\"id\": \"001\", \"name\": \"agent-1\", \"ip\": \"10.0.0.1\", "
    "\"key\": \"ac575526e8bbcc3a3bd9a2b5b5f3d1e0a3a7c0f0a5d3b1e7f9c2d4e6f8a0b2c4\"}}\n";

int main(int argc, char **argv)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    static char request[65536];
    if (argc != 2 || strlen(argv[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: floor SOCKET\n");
        return 2;
    }
    strcpy(address.sun_path, argv[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0
        || listen(listener, 4096) < 0) {
        perror("floor");
        return 1;
    }
    fprintf(stderr, "floor: ready\n");
    for (;;) {
        int connection = accept(listener, NULL, NULL);
        if (connection < 0)
            continue;
        if (recv(connection, request, sizeof request, 0) > 0
            && send(connection, ANSWER, sizeof ANSWER - 1, MSG_NOSIGNAL) < 0)
            perror("floor: send");
        close(connection);
    }
}
