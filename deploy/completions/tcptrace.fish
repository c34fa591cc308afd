# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_tcptrace_global_optspecs
    string join \n h/help V/version
end

function __fish_tcptrace_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_tcptrace_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_tcptrace_using_subcommand
    set -l cmd (__fish_tcptrace_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c tcptrace -n "__fish_tcptrace_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tcptrace -n "__fish_tcptrace_needs_command" -s V -l version -d 'Print version'
complete -c tcptrace -n "__fish_tcptrace_needs_command" -f -a "leaks" -d 'Tell who leaks sockets in CLOSE_WAIT, why, and since when'
complete -c tcptrace -n "__fish_tcptrace_needs_command" -f -a "states" -d 'Count sockets by state, and by process, port, remote, container or network namespace'
complete -c tcptrace -n "__fish_tcptrace_needs_command" -f -a "stream" -d 'Print every TCP transition as it happens'
complete -c tcptrace -n "__fish_tcptrace_needs_command" -f -a "timewait" -d 'Measure how long TIME_WAIT really lasts, who makes it, and how it ends'
complete -c tcptrace -n "__fish_tcptrace_needs_command" -f -a "record" -d 'Write what comes in to a file, for later'
complete -c tcptrace -n "__fish_tcptrace_needs_command" -f -a "doctor" -d 'Tell what works on this machine, why not more, and what to do about it'
complete -c tcptrace -n "__fish_tcptrace_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l older-than -d 'How long a socket must have been in its state [default: 60s; 1s for a program that is run]' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l report -d 'Where the report of a program that is run goes, instead of standard error' -r -F
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l interval -d 'How often to look, at most [default: 5s; 1s for a program that is run]' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l state -d 'State in which sockets pile up: CLOSE_WAIT, or ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING, SYN_RECV, SYN_SENT; may be given again' -r -f -a "ESTABLISHED\t''
SYN_SENT\t''
SYN_RECV\t''
FIN_WAIT1\t''
FIN_WAIT2\t''
CLOSE_WAIT\t''
LAST_ACK\t''
CLOSING\t''"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -s o -l output -d 'How to print: text for people, json for programs (one object a line)' -r -f -a "text\t'For people'
json\t'For programs: one object a line'"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l from -d 'Read a recording instead of the kernel; - is standard input' -r -F
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l duration -d 'End after this time: 30s, 5m, 1h' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l buffer -d 'Size of the buffer between kernel and tcptrace, a power of two from 4K to 1G [default: 4M for each CPU]' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l probes -d 'How TIME_WAIT and accept() are followed: by probes of the one kind, or of the other, or by none; auto takes what this kernel accepts, functions first. With none, TIME_WAIT comes from looks at sock_diag four times a second, and is an estimate' -r -f -a "auto\t''
functions\t''
tracepoints\t''
none\t''"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l port -d 'Port, local or remote' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l lport -d 'Local port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l rport -d 'Remote port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l addr -d 'Address, local or remote, or a network: 10.0.0.7, 10.0.0.0/8, fe80::/10' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l netns -d 'Network namespace: a name of `ip netns`, a path, or an inode number' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l pid -d 'Process that owns the socket' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l comm -d 'Name of that process, as in /proc/PID/comm' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l container -d 'Container the socket was made in: its name, or the beginning of its id' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l once -d 'Look twice, one second apart, print one report and end. Needs neither BPF nor, for one\'s own processes, privileges'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l exit-code -d 'Exit with 1 if the last report tells of a leak'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l force -d 'Overwrite an older report in that file'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l as-root -d 'Run the program as root, also under sudo, doas or pkexec'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l stacks -d 'Also from where in its code the process opened the sockets: the stack at connect() and accept(), with files and lines where there is debug information'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l dwell -d 'With every report, also how long sockets stay in the state, by process; whoever opens a connection is remembered for it, which costs more of every connection'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l no-color -d 'No colours (also: set NO_COLOR). There are none anyway unless the output is a terminal'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -l probe-log -d 'Log what the probes themselves meet and cannot explain (for bug reports)'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -s 4 -l ipv4 -d 'IPv4 only; IPv4 on an IPv6 socket is IPv4'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -s 6 -l ipv6 -d 'IPv6 only'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand leaks" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l by -d 'Tell sockets apart by this' -r -f -a "process\t'The processes that hold it'
port\t'The local port where something listens on it, else the remote one'
remote\t'The remote address'
container\t'The container it was made in'
netns\t'The network namespace it is in'"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l top -d 'Only so many lines, the largest; the rest is counted in one' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l watch -d 'Look again, every two seconds or as often as said, until Ctrl-C: redrawn on a terminal, appended to a pipe' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l duration -d 'End after this time: 30s, 5m, 1h' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -s o -l output -d 'How to print: text for people, json for programs (one object a line)' -r -f -a "text\t'For people'
json\t'For programs: one object a line'"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l port -d 'Port, local or remote' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l lport -d 'Local port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l rport -d 'Remote port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l addr -d 'Address, local or remote, or a network: 10.0.0.7, 10.0.0.0/8, fe80::/10' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l netns -d 'Network namespace: a name of `ip netns`, a path, or an inode number' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l pid -d 'Process that owns the socket' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l comm -d 'Name of that process, as in /proc/PID/comm' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l container -d 'Container the socket was made in: its name, or the beginning of its id' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l state -d 'Only sockets in this state (CLOSE_WAIT or close-wait); may be given again' -r -f -a "ESTABLISHED\t''
SYN_SENT\t''
SYN_RECV\t''
FIN_WAIT1\t''
FIN_WAIT2\t''
TIME_WAIT\t''
CLOSE\t''
CLOSE_WAIT\t''
LAST_ACK\t''
LISTEN\t''
CLOSING\t''"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -l fds -d 'Also every socket, and the descriptors by which processes hold it; by process unless --by says otherwise'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -s 4 -l ipv4 -d 'IPv4 only; IPv4 on an IPv6 socket is IPv4'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -s 6 -l ipv6 -d 'IPv6 only'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand states" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -s o -l output -d 'How to print: text for people, json for programs (one object a line)' -r -f -a "text\t'For people'
json\t'For programs: one object a line'"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l from -d 'Read a recording instead of the kernel; - is standard input' -r -F
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l duration -d 'End after this time: 30s, 5m, 1h' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l buffer -d 'Size of the buffer between kernel and tcptrace, a power of two from 4K to 1G [default: 4M for each CPU]' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l probes -d 'How TIME_WAIT and accept() are followed: by probes of the one kind, or of the other, or by none; auto takes what this kernel accepts, functions first. With none, TIME_WAIT comes from looks at sock_diag four times a second, and is an estimate' -r -f -a "auto\t''
functions\t''
tracepoints\t''
none\t''"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l port -d 'Port, local or remote' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l lport -d 'Local port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l rport -d 'Remote port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l addr -d 'Address, local or remote, or a network: 10.0.0.7, 10.0.0.0/8, fe80::/10' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l netns -d 'Network namespace: a name of `ip netns`, a path, or an inode number' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l pid -d 'Process that owns the socket' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l comm -d 'Name of that process, as in /proc/PID/comm' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l container -d 'Container the socket was made in: its name, or the beginning of its id' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l state -d 'Only transitions from or to this state (CLOSE_WAIT or close-wait); may be given again' -r -f -a "ESTABLISHED\t''
SYN_SENT\t''
SYN_RECV\t''
FIN_WAIT1\t''
FIN_WAIT2\t''
TIME_WAIT\t''
CLOSE\t''
CLOSE_WAIT\t''
LAST_ACK\t''
LISTEN\t''
CLOSING\t''"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l no-color -d 'No colours (also: set NO_COLOR). There are none anyway unless the output is a terminal'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -l probe-log -d 'Log what the probes themselves meet and cannot explain (for bug reports)'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -s 4 -l ipv4 -d 'IPv4 only; IPv4 on an IPv6 socket is IPv4'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -s 6 -l ipv6 -d 'IPv6 only'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand stream" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -s o -l output -d 'How to print: text for people, json for programs (one object a line)' -r -f -a "text\t'For people'
json\t'For programs: one object a line'"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l from -d 'Read a recording instead of the kernel; - is standard input' -r -F
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l duration -d 'End after this time: 30s, 5m, 1h' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l buffer -d 'Size of the buffer between kernel and tcptrace, a power of two from 4K to 1G [default: 4M for each CPU]' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l probes -d 'How TIME_WAIT and accept() are followed: by probes of the one kind, or of the other, or by none; auto takes what this kernel accepts, functions first. With none, TIME_WAIT comes from looks at sock_diag four times a second, and is an estimate' -r -f -a "auto\t''
functions\t''
tracepoints\t''
none\t''"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l port -d 'Port, local or remote' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l lport -d 'Local port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l rport -d 'Remote port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l addr -d 'Address, local or remote, or a network: 10.0.0.7, 10.0.0.0/8, fe80::/10' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l netns -d 'Network namespace: a name of `ip netns`, a path, or an inode number' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l pid -d 'Process that owns the socket' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l comm -d 'Name of that process, as in /proc/PID/comm' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l container -d 'Container the socket was made in: its name, or the beginning of its id' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l no-color -d 'No colours (also: set NO_COLOR). There are none anyway unless the output is a terminal'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -l probe-log -d 'Log what the probes themselves meet and cannot explain (for bug reports)'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -s 4 -l ipv4 -d 'IPv4 only; IPv4 on an IPv6 socket is IPv4'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -s 6 -l ipv6 -d 'IPv6 only'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand timewait" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l interval -d 'How often to look who holds sockets in CLOSE_WAIT, at most' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l duration -d 'End after this time: 30s, 5m, 1h' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l buffer -d 'Size of the buffer between kernel and tcptrace, a power of two from 4K to 1G [default: 4M for each CPU]' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l probes -d 'How TIME_WAIT and accept() are followed: by probes of the one kind, or of the other, or by none; auto takes what this kernel accepts, functions first. With none, TIME_WAIT comes from looks at sock_diag four times a second, and is an estimate' -r -f -a "auto\t''
functions\t''
tracepoints\t''
none\t''"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l port -d 'Port, local or remote' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l lport -d 'Local port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l rport -d 'Remote port' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l addr -d 'Address, local or remote, or a network: 10.0.0.7, 10.0.0.0/8, fe80::/10' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l netns -d 'Network namespace: a name of `ip netns`, a path, or an inode number' -r
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l force -d 'Overwrite an older recording in that file'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l stacks -d 'Also from where in their code processes connect and accept, for `leaks --stacks --from`'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -l probe-log -d 'Log what the probes themselves meet and cannot explain (for bug reports)'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -s 4 -l ipv4 -d 'IPv4 only; IPv4 on an IPv6 socket is IPv4'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -s 6 -l ipv6 -d 'IPv6 only'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand record" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand doctor" -s o -l output -d 'How to print: text for people, json for programs (one object)' -r -f -a "text\t'For people'
json\t'For programs: one object a line'"
complete -c tcptrace -n "__fish_tcptrace_using_subcommand doctor" -l no-color -d 'No colours (also: set NO_COLOR). There are none anyway unless the output is a terminal'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand help; and not __fish_seen_subcommand_from leaks states stream timewait record doctor help" -f -a "leaks" -d 'Tell who leaks sockets in CLOSE_WAIT, why, and since when'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand help; and not __fish_seen_subcommand_from leaks states stream timewait record doctor help" -f -a "states" -d 'Count sockets by state, and by process, port, remote, container or network namespace'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand help; and not __fish_seen_subcommand_from leaks states stream timewait record doctor help" -f -a "stream" -d 'Print every TCP transition as it happens'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand help; and not __fish_seen_subcommand_from leaks states stream timewait record doctor help" -f -a "timewait" -d 'Measure how long TIME_WAIT really lasts, who makes it, and how it ends'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand help; and not __fish_seen_subcommand_from leaks states stream timewait record doctor help" -f -a "record" -d 'Write what comes in to a file, for later'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand help; and not __fish_seen_subcommand_from leaks states stream timewait record doctor help" -f -a "doctor" -d 'Tell what works on this machine, why not more, and what to do about it'
complete -c tcptrace -n "__fish_tcptrace_using_subcommand help; and not __fish_seen_subcommand_from leaks states stream timewait record doctor help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
