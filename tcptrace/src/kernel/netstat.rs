//! The TCP counters of a network namespace: the `TcpExt` lines of `/proc/net/netstat`.

/// Counters since the namespace began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpExt {
    /// `TCPTimeWaitOverflow`: how often TIME_WAIT was skipped because `tcp_max_tw_buckets` was
    /// reached, or no memory was left.
    pub time_wait_overflow: u64,
}

impl TcpExt {
    /// Reads them from the text of `/proc/net/netstat`: pairs of lines, names above values. None
    /// when a counter is not there.
    #[must_use]
    pub fn parse(netstat: &str) -> Option<Self> {
        let mut lines = netstat.lines().filter_map(|l| l.strip_prefix("TcpExt: "));
        let names = lines.next()?.split_ascii_whitespace();
        let values = lines.next()?.split_ascii_whitespace();
        let (_, overflow) = names
            .zip(values)
            .find(|&(name, _)| name == "TCPTimeWaitOverflow")?;
        Some(Self {
            time_wait_overflow: overflow.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_value_under_its_name() {
        let text = "MPTcpExt: A TCPTimeWaitOverflow\nMPTcpExt: 1 2\n\
            TcpExt: SyncookiesSent TCPTimeWaitOverflow TW\nTcpExt: 0 18446744073709551615 26\n\
            IpExt: InNoRoutes\nIpExt: 0\n";
        let counters = TcpExt::parse(text).unwrap();
        assert_eq!(counters.time_wait_overflow, u64::MAX);
    }

    #[test]
    fn says_nothing_where_there_is_nothing() {
        for text in [
            "",
            "TcpExt: TCPTimeWaitOverflow\n",
            "TcpExt: TW TCPTimeWaitOverflow\nTcpExt: 1\n",
            "TcpExt: TCPTimeWaitOverflow\nTcpExt: x\n",
        ] {
            assert_eq!(TcpExt::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_running_kernel_has_them() {
        let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
        assert!(TcpExt::parse(&text).is_some(), "{text}");
    }
}
