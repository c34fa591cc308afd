//! Single TCP segments over IPv4: reading those that pass, and making one by hand.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{Netns, Pair};

const IP_HEADER: usize = 20;
const TCP_HEADER: usize = 20;
const ACK: u8 = 0x10;

/// What a segment made by hand says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Flag {
    /// Nothing but an acknowledgement.
    Ack = ACK,
    /// Reset.
    Rst = 0x04,
}

/// Knows the sequence numbers of every connection, by reading all segments that pass.
#[derive(Debug)]
pub struct Capture {
    packets: Socket,
    raw: Socket,
    /// By source and destination: the last sequence number after a segment, and its acknowledgement.
    last: HashMap<(SocketAddr, SocketAddr), (u32, u32)>,
}

impl Capture {
    pub(crate) fn start(netns: &Netns) -> Self {
        let all_ipv4 = i32::from((libc::ETH_P_IP as u16).to_be());
        let (packets, raw) = netns.inside(|| {
            let packets = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(all_ipv4)));
            let raw = Socket::new(
                Domain::IPV4,
                Type::RAW,
                Some(Protocol::from(libc::IPPROTO_RAW)),
            );
            (
                packets.expect("a packet socket"),
                raw.expect("a raw socket"),
            )
        });
        packets.set_nonblocking(true).expect("a socket can be");
        Self {
            packets,
            raw,
            last: HashMap::new(),
        }
    }

    /// The next sequence number that the end `pair.local` expects: its last acknowledgement.
    ///
    /// # Panics
    /// When no segment of this connection has passed.
    pub fn expected(&mut self, pair: Pair) -> u32 {
        self.read();
        self.last[&(pair.local, pair.remote)].1
    }

    /// Sends to `pair.local` a segment that looks like one of `pair.remote`, with exactly the sequence
    /// number that is expected and without options.
    ///
    /// # Panics
    /// When no segment of this connection has passed, or this one cannot be sent.
    pub fn forge(&mut self, pair: Pair, flag: Flag) {
        let sequence = self.expected(pair);
        let acknowledged = self.last[&(pair.local, pair.remote)].0;
        let packet = segment(
            pair.remote,
            pair.local,
            sequence,
            acknowledged,
            flag as u8 | ACK,
        );
        self.raw
            .send_to(&packet, &pair.local.into())
            .expect("loopback takes it");
    }

    /// Reads what has passed so far. The kernel keeps some hundred segments for this, no more.
    ///
    /// # Panics
    /// When the socket fails.
    pub fn read(&mut self) {
        let mut packet = [0; 65536];
        loop {
            match (&self.packets).read(&mut packet) {
                Ok(length) => self.note(&packet[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("packet socket: {error}"),
            }
        }
    }

    fn note(&mut self, packet: &[u8]) {
        if i32::from(packet[9]) != libc::IPPROTO_TCP {
            return;
        }
        let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        let header = usize::from(packet[0] & 15) * 4;
        let tcp = &packet[header..total];
        let address = |at: usize, port: usize| {
            let ip = Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
            SocketAddr::new(ip.into(), u16::from_be_bytes([tcp[port], tcp[port + 1]]))
        };
        let (from, to) = (address(12, 0), address(16, 2));
        let data = tcp.len() - usize::from(tcp[12] >> 4) * 4;
        // FIN and SYN count as a byte each.
        let flags = u32::from(tcp[13] & 1) + u32::from(tcp[13] >> 1 & 1);
        let end = number(tcp, 4).wrapping_add(data as u32).wrapping_add(flags);
        self.last.insert((from, to), (end, number(tcp, 8)));
    }
}

/// An IPv4 packet with a TCP segment without data. The kernel fills in the IP checksum.
fn segment(from: SocketAddr, to: SocketAddr, sequence: u32, ack: u32, flags: u8) -> Vec<u8> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (from.ip(), to.ip()) else {
        panic!("segments are made for IPv4 only");
    };
    let mut tcp = Vec::with_capacity(TCP_HEADER);
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(ack.to_be_bytes());
    tcp.extend([((TCP_HEADER / 4) << 4) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [
        source.octets(),
        destination.octets(),
        [0, 6, 0, TCP_HEADER as u8],
    ];
    let checksum = checksum(pseudo.as_flattened().iter().chain(&tcp).copied());
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());

    let mut packet = vec![0_u8; IP_HEADER];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&((IP_HEADER + TCP_HEADER) as u16).to_be_bytes());
    packet[8] = 64;
    packet[9] = libc::IPPROTO_TCP as u8;
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&destination.octets());
    packet.extend(tcp);
    packet
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: impl Iterator<Item = u8>) -> u16 {
    let mut sum = 0_u32;
    for (index, byte) in bytes.enumerate() {
        sum += u32::from(byte) << if index % 2 == 0 { 8 } else { 0 };
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
