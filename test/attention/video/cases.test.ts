import { videoEncoderCases } from '../../cases/attention/videoEncoder.ts';
import { testCases } from '../../helpers/cases.ts';

testCases(videoEncoderCases);
