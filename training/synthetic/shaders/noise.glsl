// Smooth spatial noise and the hairline, shared by the paint and head programs.

uniform vec4 hairline;  // height, depth of the dents at its sides, and height and phase of a wave

float hash(vec3 p) {
    p = fract(p * .3183099 + .1) * 17.;
    return fract(p.x * p.y * p.z * (p.x + p.y + p.z));
}

float noise(vec3 p) {  // 0 to 1, one bump a unit
    vec3 i = floor(p), f = fract(p);
    f = f * f * (3. - 2. * f);
    return mix(
        mix(mix(hash(i), hash(i + vec3(1, 0, 0)), f.x), mix(hash(i + vec3(0, 1, 0)), hash(i + vec3(1, 1, 0)), f.x), f.y),
        mix(mix(hash(i + vec3(0, 0, 1)), hash(i + vec3(1, 0, 1)), f.x),
            mix(hash(i + vec3(0, 1, 1)), hash(i + vec3(1, 1, 1)), f.x), f.y),
        f.z);
}

float octaves(vec3 p) {
    return noise(p) * .5 + noise(p * 2.1) * .25 + noise(p * 4.3) * .13 + noise(p * 8.7) * .07;
}

float gauss(float x) {
    return exp(-x * x);
}

float spot(vec2 place, vec2 centre, vec2 size) {
    return gauss(length((place - centre) / size));
}

float above_hairline(vec3 rest) {  // signed height above the hairline
    float front = clamp((rest.z - .2) / .6, 0., 1.), side = abs(rest.x);
    float line = 6.62 + 1.28 * pow(clamp((rest.z + .02) / 1.22, 0., 1.), 1.25)
        - .10 * pow(clamp(side / .8, 0., 1.), 2.) * front;
    return rest.y - line - hairline.x - front * hairline.y * gauss((side - .42) / .2)
        - front * hairline.z * sin(3. * rest.x + hairline.w);
}
