//! A path that fails and comes back, over minutes of a clock that these tests move on.

use super::*;
use crate::clock::skip_us;
use crate::link::transport::{HEALTHY_US, REST_MAX_US, REST_MIN_US};

/// Carried by datagrams and heard, and then so long no word: many times in [`HEALTHY_US`].
const PAUSE_US: u64 = HEALTHY_US / 3;

impl Ends {
    /// Datagrams are lost until both ends say all over TCP; how long each leaves the path alone.
    fn lose_path(&mut self, network: &Network) -> [u64; 2] {
        let begun_us = now_us();
        network.set_loss(100);
        self.say(0, 30);
        self.say(1, 30);
        self.until_both_use("tcp");
        self.until_heard();
        let next_us = |link: &PacketLink| link.datagrams.as_ref().unwrap().next_probe_us();
        self.links.each_ref().map(|link| next_us(link) - begun_us)
    }

    /// Datagrams pass again, and the longest rest is over.
    fn regain_path(&mut self, network: &Network) {
        network.set_loss(0);
        skip_us(REST_MAX_US);
        self.until_both_use("udp");
        self.talk(10);
    }

    /// Datagrams carry what is said, now and then, for so long.
    fn be_well(&mut self, for_us: u64) {
        for _ in 0..for_us.div_ceil(PAUSE_US) {
            skip_us(PAUSE_US);
            self.talk(5);
        }
        assert_eq!(self.carriers(), ["udp", "udp"]);
    }
}

#[test]
fn a_path_that_was_well_for_minutes_is_asked_soon_when_it_fails_again() {
    let network = Network::new(0);
    let mut ends = Ends::new(&network);
    ends.until_both_use("udp");
    ends.talk(20);
    let mut failures = 0;
    let mut rest_us = [0; 2];
    while rest_us.iter().any(|rest_us| *rest_us < REST_MAX_US) {
        let before_us = rest_us;
        rest_us = ends.lose_path(&network);
        assert!(rest_us[0] > before_us[0] && rest_us[1] > before_us[1] || failures > 5);
        ends.regain_path(&network);
        failures += 1;
    }
    // One, two, four ... seconds, and then no longer ones.
    assert!(failures >= 7, "{failures}");

    // Well for a moment says nothing,
    let rest_us = ends.lose_path(&network);
    assert!(rest_us.iter().all(|rest_us| *rest_us >= REST_MAX_US));
    ends.regain_path(&network);
    // nor does a long time in which nothing is said.
    skip_us(10 * HEALTHY_US);
    let rest_us = ends.lose_path(&network);
    assert!(rest_us.iter().all(|rest_us| *rest_us >= REST_MAX_US));
    ends.regain_path(&network);

    ends.be_well(7 * HEALTHY_US);
    let begun_us = now_us();
    let rest_us = ends.lose_path(&network);
    let soon_us = REST_MIN_US + (now_us() - begun_us);
    assert!(
        rest_us.iter().all(|rest_us| *rest_us <= soon_us),
        "{rest_us:?}"
    );
    // All that was said at any time was heard once and in order, or `talk` would have failed.
    failures += 3;
    assert!(
        ends.links
            .iter()
            .all(|link| link.stats().fallbacks == failures)
    );
}
